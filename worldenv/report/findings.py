"""What a run found, in a sentence, and what it did not find."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worldenv.report import tables
from worldenv.report.fields import POLICIES, is_unverified, protocols

SIGNIFICANT = 0.05
"""A change is called one where the paired test's p is below this."""


def verdict(report: Mapping[str, Any]) -> str:
    """True success before and after, with intervals and p, in words that the paired test supports; of a run from recordings, that there is none."""
    ended_by = protocols(report)[0]
    before, after = (report["eval"][policy][ended_by] for policy in POLICIES)
    paired = report["eval"]["paired"]
    change = after["successes"] - before["successes"]

    def rate(counts: Mapping[str, Any]) -> str:
        low, high = counts["interval"]
        return f"{tables.percent(counts['successes'], counts['episodes'])} (95\u00a0% interval {100 * low:.1f} to {100 * high:.1f})"

    numbers = f"from {rate(before)} to {rate(after)}"
    if "difference" in paired and "interval" in paired:
        low, high = paired["interval"]
        numbers += f", by {100 * paired['difference']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"
    unverified = is_unverified(report)
    pairs = (
        f"from the same {after['episodes']} held-out first frames: {paired['wins']} gained, {paired['losses']} lost, "
        f"two-sided exact McNemar {tables.p_value(paired['p_value'])}"
    ) if unverified else (
        f"on the same {after['episodes']} test episodes: {paired['wins']} gained, {paired['losses']} lost, "
        f"two-sided exact McNemar {tables.p_value(paired['p_value'])}"
    )
    if unverified:
        short = "This short run shows that every stage works, and claims nothing. " if report["settings"]["fast"] else ""
        return (
            f"{short}Whether post-training changed what the robot does is unverified: this run had recordings and no robot. Imagined success, by the "
            f"reflector's own judgement, went {numbers}, {pairs}. Evaluate the policy on the robot before you rely on it."
        )
    if report["settings"]["fast"]:
        return f"This short run shows that every stage works, and claims nothing about success: true success went {numbers}, {pairs}."
    if paired["p_value"] >= SIGNIFICANT:
        return f"Post-training did not change success in the true environment measurably: it went {numbers}, {pairs}."
    return f"Post-training {'raised' if change > 0 else 'lowered'} success in the true environment {numbers}, {pairs}."


def imagined_beside_true(report: Mapping[str, Any]) -> str:
    """The imagined figures of the post-trained policy, each with the true one or the word "unverified"."""
    counts, returns = report["world"]["outcome_agreement"], report["loop"]["returns"]
    n = counts["episodes"]
    if is_unverified(report):
        return (
            f"In the imagined world the mean return went from {returns[0]:.3f} in the first iteration to {returns[-1]:.3f} in the last of "
            f"{len(returns)}, unverified. Of {n} held-out recordings, imagined from their first frames with their own actions, "
            f"{counts['imagined_successes']} succeeded in imagination and {counts['true_successes']} in the recording; the outcomes agreed in "
            f"{counts['agree']}."
        )
    return (
        f"In the imagined world the mean return went from {returns[0]:.3f} in the first iteration to {returns[-1]:.3f} in the last of "
        f"{len(returns)} (unverified: the reflector's own judgement). Of {n} rollouts with the same actions in both worlds, "
        f"{counts['imagined_successes']} succeeded in imagination and {counts['true_successes']} in truth; the outcomes agreed in "
        f"{counts['agree']}."
    )


def limits(report: Mapping[str, Any]) -> list[str]:
    """What this report does not show."""
    counts, paired = report["world"]["outcome_agreement"], report["eval"]["paired"]
    if is_unverified(report):
        return [
            "Success of the robot, before or after: it was not there. Imagined success is the reflector's judgement of imagined frames, and "
            "post-training is rewarded by that same judgement, so it rises where the policy learns to please it, too.",
            f"One run with one seed ({report['seed']}): intervals and p cover the choice of first frames, not another seed's training.",
            f"Outcome agreement rests on {counts['episodes']} held-out recordings of the policy before post-training; what the policy does after it "
            "may be imagined and judged worse.",
            "PSNR averages over all pixels: a block that is missed or carried along hardly moves it. Read outcome agreement first.",
            "Seconds hold for this machine and for whatever else ran on it.",
        ]
    shown = [
        f"One run with one seed ({report['seed']}): intervals and p cover the choice of test episodes, not another seed's training.",
        "Imagined return is the reflector's judgement of imagined frames. It is no evidence of success; the true environment alone is.",
        f"Outcome agreement rests on {counts['episodes']} replayed rollouts; between two runs a difference of a few of them is chance.",
        "PSNR averages over all pixels: a block that is missed or carried along hardly moves it. Read outcome agreement first.",
        "Held-out exploration chose which of the simulator's weights are kept, by their loss: its PSNR there is a little better than elsewhere.",
        "The reflector's figures are for held-out episodes of the fine-tuned policy; on imagined frames, and on what the policy learns to do "
        "to please it, it errs more often.",
        "Seconds hold for this machine and for whatever else ran on it.",
    ]
    if report["settings"]["fast"]:
        shown.insert(0, "Anything about success: every stage was cut short (--fast); the figures show that the path is whole, no more.")
    elif paired["p_value"] >= SIGNIFICANT:
        shown.insert(0, f"That post-training helps or harms: with {tables.p_value(paired['p_value'])} the difference may be chance.")
    return shown
