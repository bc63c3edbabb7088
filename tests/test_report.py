"""The report: its fields, its files, its page; and what a run writes down about itself."""

from __future__ import annotations

import base64
import copy
import importlib.util
import io
import json
import math
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldenv import report as reports
from worldenv.cli.report import main
from worldenv.report import fields, findings, record, tables, videos
from worldenv.report.figures import calibration

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("push the red block to the strip", "push the <b>blue</b> block & wait", "lift the second \"cube\"")  # fmt: skip


def wilson(successes: int, episodes: int) -> list[float]:
    z, p = 1.959963984540054, successes / episodes
    centre, spread = p + z * z / (2 * episodes), z * math.sqrt(p * (1 - p) / episodes + z * z / (4 * episodes**2))
    return [max(0.0, (centre - spread) / (1 + z * z / episodes)), min(1.0, (centre + spread) / (1 + z * z / episodes))]


def tally(successes: list[int], each: int) -> dict[str, Any]:
    def one(k: int, n: int) -> dict[str, Any]:
        return {"successes": k, "episodes": n, "interval": wilson(k, n)}

    return {**one(sum(successes), each * len(successes)), "by_task": {task: one(k, each) for task, k in zip(TASKS, successes, strict=True)}}


def agreement(both: int, false_positives: int, false_negatives: int) -> dict[str, int]:
    return {
        "episodes": 16,
        "agree": 16 - false_positives - false_negatives,
        "imagined_successes": both + false_positives,
        "true_successes": both + false_negatives,
        "false_positives": false_positives,
        "false_negatives": false_negatives,
    }


def in_all(parts: list[dict[str, int]]) -> dict[str, Any]:
    return {**{name: sum(part[name] for part in parts) for name in parts[0]}, "by_task": dict(zip(TASKS, parts, strict=True))}


def example() -> dict[str, Any]:
    stages = {"demos": 1.4, "sft": 96.2, "world": 902.0, "loop": 1020.4}
    return {
        "preset": "tiny",
        "seed": 7,
        "versions": {"python": "3.11.7", "torch": "2.13.0", "cpu": "a processor"},
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "seconds_total": 2033.0,
        "peak_rss_mb": 2410.5,
        "settings": {"fast": False, "env": {"steps": 32}},
        "stages": {name: {"seconds": seconds, "peak_rss_mb": 700.0} for name, seconds in stages.items()},
        "eval": {
            "sft": {"oracle": tally([101, 96, 92], 200), "limit": tally([95, 92, 80], 200), "reflector": tally([90, 80, 77], 200)},
            "loop": {"oracle": tally([121, 104, 99], 200), "limit": tally([115, 99, 90], 200), "reflector": tally([110, 95, 88], 200)},
            "paired": {"wins": 74, "losses": 39, "p_value": 0.00131, "difference": 0.0583, "interval": [0.0236, 0.0921]},
        },
        "world": {
            "psnr_by_chunk": [27.0, 26.4, 25.3, 24.1],
            "psnr_copy_first_by_chunk": [25.2, 22.4, 20.2, 19.5],
            "psnr_ceiling_by_chunk": [27.3, 27.4, 27.1, 26.6],
            "outcome_agreement": in_all([agreement(7, 1, 0), agreement(6, 3, 1), agreement(5, 1, 2)]),
            "outcome_agreement_sft": in_all([agreement(6, 0, 0), agreement(6, 1, 1), agreement(4, 2, 0)]),
        },
        "reward": {
            "auc": 0.9941,
            "false_stop_rate": 0.043,
            "recall": 0.752,
            "precision": None,
            "ece": 0.0123,
            "episodes": 60,
            "success_episodes": 31,
            "drawn": {"auc": 0.9876, "false_stop_rate": 0.05, "recall": 0.7, "precision": 0.8, "ece": 0.02},
        },
        "loop": {
            "returns": [0.4, 0.42, 0.47],
            "engines": {"simulator_unet": {"back_end": "eager"}},
            "seconds_per_iteration": 34.0,
            "curve": [{"iteration": 5 * i, **tally([20 + i, 24, 22 - i], 50)} for i in range(3)],
            "metrics": [{"imagined_success": 0.5, "clip_fraction": 0.1 * i, "ratio_max": 1.3, "kl": 0.01 * 9**i} for i in range(3)],
        },
        "notes": ["No pretrained backbone."],
    }


def moving_square(colour: tuple[int, int, int], frames: int = 12) -> np.ndarray:
    out = np.full((frames, 16, 16, 3), 90, np.uint8)
    for t in range(frames):
        out[t, 4:12, t % 8 : t % 8 + 8] = colour
    return out


def example_videos() -> list[reports.Video]:
    red, blue = moving_square((200, 40, 40)), moving_square((40, 60, 200))
    scores = np.linspace(0, 1, 12)
    return [
        reports.Video(f"Success: {TASKS[1]}", "It <i>stops</i>.", red, blue, scores, np.arange(12) > 8),
        reports.Video("Imagined alone", "", red),
    ]


def example_figures() -> reports.Figures:
    score = np.linspace(0, 1, 101, dtype=np.float32)
    curve = np.stack([np.arange(1, 50), 1 / np.arange(1, 50)], axis=1).astype(np.float64)
    return reports.Figures(score, score > 0.4, {"Fine-tuning: L1": curve})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "one"
    made = reports.write(out, example(), example_figures(), example_videos())
    assert {out / path for path in made} == {path for path in out.rglob("*") if path.is_file()}
    assert {Path("report.json"), Path("report.html")} <= set(made)
    return out


@pytest.fixture
def a_copy(run: Path, tmp_path: Path) -> Path:
    subprocess.run(["cp", "-r", str(run), str(tmp_path / "copy")], check=True)
    return tmp_path / "copy"


# Fields


def test_round_trip(run: Path) -> None:
    assert reports.read(run) == example()
    assert reports.read(run / "report.json") == example()


def test_numpy_becomes_plain() -> None:
    given_ = example()
    given_["loop"]["returns"] = np.array([0.4, 0.42, 0.47])
    given_["seed"] = np.int64(7)
    given_["eval"]["sft"]["oracle"]["interval"] = tuple(given_["eval"]["sft"]["oracle"]["interval"])
    reports.validate(given_)
    assert fields.plain(given_) == example()


def concrete(path: str) -> list[str]:
    """The keys of one place that a path of FIELDS stands for, in the example."""
    node, keys = example(), []
    for key in path.split("."):
        name = key.removesuffix("?")
        keys.append(next(iter(node)) if name == "*" else name.split("|")[-1])
        node = node[keys[-1]]
    return keys


def parent_of(node: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    for key in keys[:-1]:
        node = node[key]
    return node


@pytest.mark.parametrize("field", [f for f in reports.FIELDS if not f.path.endswith("?")], ids=lambda f: f.path)
def test_missing_field_is_named(field: fields.Field) -> None:
    broken, keys = example(), concrete(field.path)
    del parent_of(broken, keys)[keys[-1]]
    with pytest.raises(ValueError, match=rf"field {re.escape('.'.join(keys))} is missing"):
        reports.validate(broken)


def test_missing_parent_is_named() -> None:
    broken = example()
    del broken["eval"]["loop"]["limit"]
    with pytest.raises(ValueError, match=r"field eval\.loop\.limit\.successes is missing"):
        reports.validate(broken)
    broken = example()
    broken["stages"] = {}
    with pytest.raises(ValueError, match=r"field stages\.\*\.seconds is missing"):
        reports.validate(broken)


def test_optional_fields_may_be_missing() -> None:
    lean = example()
    del lean["stages"]["sft"]["peak_rss_mb"], lean["world"]["outcome_agreement_sft"], lean["eval"]["paired"]["difference"]
    del lean["eval"]["paired"]["interval"], lean["reward"]["drawn"], lean["reward"]["episodes"], lean["reward"]["success_episodes"]
    for policy in fields.POLICIES:
        for protocol in fields.TRUE_PROTOCOLS:
            del lean["eval"][policy][protocol]["by_task"]
    reports.validate(lean)
    assert tables.success_by_task(lean) is None
    assert tables.imagined_before(lean) is None
    assert tables.reflector(lean).columns == ("figure", "true frames")
    assert "points" not in findings.verdict(lean)


@pytest.mark.parametrize("field", reports.FIELDS, ids=lambda f: f.path)
def test_wrong_kind_is_named(field: fields.Field) -> None:
    broken, keys = example(), concrete(field.path)
    parent_of(broken, keys)[keys[-1]] = -1.5
    with pytest.raises(ValueError, match=rf"{re.escape('.'.join(keys))} is -1.5, want"):
        reports.validate(broken)


@pytest.mark.parametrize(
    ("keys", "value", "says"),
    [
        (["eval", "sft", "oracle", "successes"], 601, "601 successes of 600"),
        (["eval", "sft", "limit", "successes"], 100, "does not hold 100/600"),
        (["eval", "sft", "limit", "interval"], [0.5, 0.4], "want \\[low, high\\]"),
        (["eval", "sft", "reflector", "episodes"], True, "want a whole number"),
        (["eval", "loop", "reflector", "by_task", TASKS[0], "successes"], 109, "successes sum to 292, not 293"),
        (["eval", "paired", "wins"], 73, "wins - losses = 34, but successes changed by 35"),
        (["eval", "paired", "p_value"], 1.2, "want a number in 0 .. 1"),
        (["world", "psnr_by_chunk"], [27.0], "as many in each"),
        (["world", "outcome_agreement_sft", "agree"], 43, r"outcome_agreement_sft: 43 agree and 4 do not, but there are 48"),
        (["eval", "paired", "interval"], [0.1, -0.1], "want \\[low, high\\] with -1"),
        (["world", "outcome_agreement", "agree"], 41, "41 agree and 8 do not, but there are 48"),
        (["world", "outcome_agreement", "by_task", TASKS[1], "true_successes"], 8, "do not fit the errors"),
        (["reward", "auc"], float("nan"), r"report\.reward\.auc: nan is not finite"),
        (["loop", "metrics"], [], "loop.metrics has 0 iterations, loop.returns 3"),
        (["loop", "returns"], [0.1, float("inf"), 0.2], r"report\.loop\.returns\[1\]: inf"),
        (["settings", "env", "steps"], {1, 2}, r"report\.settings\.env\.steps: set cannot stand"),
        (["settings", "env"], {3: 4}, "key 3 is not text"),
    ],
)
def test_what_cannot_be_is_refused(keys: list[str], value: Any, says: str) -> None:
    broken = example()
    parent_of(broken, keys)[keys[-1]] = value
    with pytest.raises(ValueError, match=says):
        reports.validate(broken)


def test_policies_on_different_episodes_are_not_paired() -> None:
    broken = example()
    broken["eval"]["loop"]["oracle"] = tally([31, 34, 30], 100)
    with pytest.raises(ValueError, match="different numbers of oracle episodes"):
        reports.validate(broken)


def leaves(node: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(node, dict | list) and node:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves(value, (*keys, key))
    else:
        yield keys


def test_comparable_ignores_times_and_memory_alone() -> None:
    whole = example()
    whole["loop"]["frames_per_second"] = 12.5
    whole["stages"]["sft"]["seconds_by_part"] = [1.0, 2.0]
    ignored = set()
    for keys in leaves(whole):
        changed = copy.deepcopy(whole)
        node = changed
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = "another value"
        if reports.comparable(changed) == reports.comparable(whole):
            ignored.add(".".join(map(str, keys)))
    times = {"seconds_total", "peak_rss_mb", "loop.seconds_per_iteration", "loop.frames_per_second"}
    times |= {"stages.sft.seconds_by_part.0", "stages.sft.seconds_by_part.1"}
    times |= {f"stages.{name}.{kind}" for name in whole["stages"] for kind in ("seconds", "peak_rss_mb")}
    assert ignored == times


def test_comparable_keeps_a_task_called_like_a_time() -> None:
    assert reports.comparable({"by_task": {"seconds": {"agree": 3}}}) == {"by_task": {"seconds": {"agree": 3}}}


def test_differences_name_the_place() -> None:
    left, right = example(), example()
    right["loop"]["returns"][1] = 0.43
    right["seed"] = 8
    right["extra"] = 1
    del right["notes"]
    right["loop"]["metrics"] = right["loop"]["metrics"][:2]
    right["settings"]["fast"] = 0  # equal to False in Python, another thing in JSON
    found = list(reports.differences(left, right))
    assert [line.split(":")[0] for line in found] == ["seed", "settings.fast", "loop.returns[1]", "loop.metrics", "notes", "extra"]
    assert "loop.returns[1]: 0.42 | 0.43" in found
    assert "notes: only on the left" in found
    assert not list(reports.differences(left, example()))


# Words


def test_verdict_says_what_the_test_supports() -> None:
    shown = example()
    assert findings.verdict(shown).startswith("Post-training raised success in the true environment from 48.2")
    assert all(
        text in findings.verdict(shown)
        for text in ("44.2 to 52.2", "50.0 to 57.9", "600 test episodes", "74 gained, 39 lost", "0.0013", "+5.8 points (+2.4 to +9.2)")
    )
    shown["eval"]["paired"]["p_value"] = 0.05
    assert "did not change success in the true environment measurably" in findings.verdict(shown)
    assert "may be chance" in findings.limits(shown)[0]
    shown["eval"]["paired"]["p_value"] = 0.01
    shown["eval"]["sft"], shown["eval"]["loop"] = shown["eval"]["loop"], shown["eval"]["sft"]
    assert findings.verdict(shown).startswith("Post-training lowered")
    shown["settings"]["fast"] = True
    assert "claims nothing about success" in findings.verdict(shown)
    assert "raised" not in findings.verdict(shown)
    assert findings.limits(shown)[0].startswith("Anything about success")


def test_imagined_figures_never_stand_alone() -> None:
    text = findings.imagined_beside_true(example())
    assert "0.400" in text
    assert "unverified" in text
    assert "23 succeeded in imagination and 21 in truth" in text


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (tables.duration(0.4213), "0.421 s"), (tables.duration(12.34), "12.3 s"), (tables.duration(59.97), "1 min 0 s"),
        (tables.duration(192), "3 min 12 s"), (tables.duration(7512), "2 h 5 min"), (tables.memory(812.4), "812 MB"),
        (tables.memory(2410.5), "2.41 GB"), (tables.memory(None), "–"), (tables.percent(1, 3), "33\u00a0%"),
        (tables.percent(289, 600), "48.2\u00a0%"), (tables.percent(0, 0), "–"), (tables.p_value(0.0321), "p\u00a0=\u00a00.032"),
        (tables.p_value(3e-9), "p\u00a0<\u00a00.0001"), (tables.p_value(1.0), "p\u00a0=\u00a01"), (tables.share(None), "no value"),
    ],
)  # fmt: skip
def test_numbers_are_written_as_people_read_them(got: str, want: str) -> None:
    assert got == want


def test_terminal_table_is_aligned() -> None:
    lines = list(tables.for_terminal(tables.imagined(example())))
    header, rows = lines[1], lines[3:7]
    assert header.endswith("false negatives")
    assert len({len(line) for line in rows} | {len(header)}) == 1  # the last column is flush right
    assert rows[-1].split() == ["all", "tasks", "23/48", "21/48", "40/48", "5", "3"]


def test_tables_take_their_own_numbers() -> None:
    before = tables.imagined_before(example())
    assert before is not None
    assert before.rows[-1] == ("all tasks", "19/48", "17/48", "44/48", "3", "1")
    judged = tables.reflector(example())
    assert judged.columns == ("figure", "true frames", "imagined frames")
    assert [row[1:] for row in judged.rows[:2]] == [("0.994", "0.988"), ("no value", "0.800")]
    assert judged.note.startswith("60 episodes, 31 of them with a success.")


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=60))
def test_calibration_is_its_definition(pairs: list[tuple[float, bool]]) -> None:
    score, success = np.array([p for p, _ in pairs]), np.array([y for _, y in pairs])
    bins = calibration(score, success)
    want = []
    for i in range(10):
        inside = [(p, y) for p, y in pairs if i <= p * 10 < i + 1 or (i == 9 and p == 1)]
        if inside:
            want.append((sum(p for p, _ in inside) / len(inside), sum(y for _, y in inside) / len(inside), len(inside)))
    np.testing.assert_allclose(np.stack([bins.score, bins.frequency, bins.count], axis=1), want, atol=1e-9)


# Page


class Reader(HTMLParser):
    """Collects what a page refers to, and checks that every element is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[tuple[str, str]] = []
        self.identifiers: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag != "meta":  # the one element here that is never closed
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.identifiers.append(str(value))
            if name in ("src", "href", "xlink:href", "srcset", "poster", "action", "data", "background", "clip-path") or "url(" in str(value):
                self.references.append((name, str(value)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_page_needs_nothing_else(run: Path) -> None:
    page = (run / "report.html").read_text()
    reader = Reader(page)
    assert not reader.open
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(reader.tags)
    own = {f"#{name}" for name in reader.identifiers}
    for name, value in reader.references:
        inside = re.findall(r"url\((.*?)\)", value) or [value]
        assert all(one.startswith("data:video/mp4;base64,") or one in own for one in inside), (name, value[:80])
    without_data = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"https?:|//[a-z]|@import|javascript:", without_data)
    assert len(reader.identifiers) == len(set(reader.identifiers))
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert reader.tags.count("video") == 2


def test_plots_take_the_colours_of_the_page(run: Path) -> None:
    page = (run / "report.html").read_text()
    plots = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(plots) == 7
    for plot in plots:
        # Fixed colours would vanish in the dark; white is the ground of Matplotlib's figure.
        assert not re.search(r"(fill|stroke): #", plot)
        assert "<style" not in plot


def test_page_escapes_every_text(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert "<b>blue" not in page
    assert "<i>stops" not in page
    text = "".join(Reader(page).text)
    assert f"Success: {TASKS[1]}" in text
    assert "It <i>stops</i>." in text
    assert TASKS[2] in text


def test_page_shows_the_numbers(run: Path) -> None:
    text = "".join(Reader((run / "report.html").read_text()).text)
    for wanted in (
        "48.2\u00a0%",
        "[44.2, 52.2]  289/600",
        "324/600",
        "121/200",
        "23/48",
        "27",
        "no value",
        "17 min 0 s",
        "0.994",
        "unverified",
    ):
        assert wanted in text, wanted
    for line in (*findings.limits(example()), *example()["notes"], findings.verdict(example()), "What this report does not show"):
        assert line in text


def test_rebuilt_page_is_the_written_one(a_copy: Path) -> None:
    before = {path: path.read_bytes() for path in a_copy.rglob("*") if path.is_file()}
    (a_copy / "report.html").unlink()
    assert reports.rebuild(a_copy) == a_copy / "report.html"
    assert {path: path.read_bytes() for path in a_copy.rglob("*") if path.is_file()} == before


def test_figures_lie_beside_the_page(run: Path) -> None:
    names = {path.stem for path in (run / "figures").glob("*.png")}
    assert names == {"success", "returns", "psnr", "iterations", "updates", "calibration", "curve-00-fine-tuning-l1"}
    for name in names:
        assert (run / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (run / f"figures/{name}.svg").read_bytes()


def test_smallest_report_has_a_page(tmp_path: Path) -> None:
    lean = example()
    lean["loop"] = {"returns": [0.5], "seconds_per_iteration": 1.0, "metrics": [{}]}
    lean["notes"] = []
    for name in ("psnr_by_chunk", "psnr_copy_first_by_chunk", "psnr_ceiling_by_chunk"):
        lean["world"][name] = [20.0]
    reports.write(tmp_path / "run", lean)
    page = tmp_path / "run/report.html"
    assert "<video" not in page.read_text()
    assert {path.stem for path in (tmp_path / "run/figures").glob("*.png")} == {"success", "returns", "psnr"}
    assert reports.rebuild(tmp_path / "run") == page


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: reports.Figures(score=np.zeros(3)), "come together"),
        (lambda: reports.Figures(np.zeros(3), np.zeros(4, bool)), r"want \(n,\) both"),
        (lambda: reports.Figures(np.full(3, 1.5), np.zeros(3, bool)), "outside 0 .. 1"),
        (lambda: reports.Figures(curves={"loss": np.zeros((3, 3))}), "curve 'loss'"),
        (lambda: reports.Video("v", "", np.zeros((3, 8, 8, 3))), "want \\(T, H, W, 3\\) uint8"),  # type: ignore[arg-type]
        (lambda: reports.Video("v", "", moving_square((1, 2, 3)), moving_square((1, 2, 3), 5)), "as imagined"),
        (lambda: reports.Video("v", "", moving_square((1, 2, 3)), scores=np.zeros(5)), "scores \\(5,\\), want \\(12,\\)"),
        (lambda: reports.Video("v", "", moving_square((1, 2, 3)), scores=np.full(12, np.nan)), "outside 0 .. 1"),
        (lambda: reports.Video("v", "", moving_square((1, 2, 3)), success=np.zeros(13, bool)), "success \\(13,\\)"),
    ],
)
def test_bad_arrays_are_refused(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


# Videos


def test_videos_decode_to_their_frames(run: Path) -> None:
    files = sorted((run / "videos").glob("*.mp4"))
    assert [path.name for path in files] == ["01-success-push-the-b-blue-b-block-wait.mp4", "02-imagined-alone.mp4"]
    embedded = re.findall(r"data:video/mp4;base64,([A-Za-z0-9+/=]+)", (run / "report.html").read_text())
    for path, data, video in zip(files, embedded, example_videos(), strict=True):
        assert base64.b64decode(data) == path.read_bytes()
        with av.open(io.BytesIO(path.read_bytes())) as opened:
            stream = opened.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in opened.decode(stream)]
            assert stream.codec_context.name == "h264"
            assert stream.average_rate == 10
        assert len(frames) == 12
        for t, frame in enumerate(frames):
            want = videos.picture(video, t)
            assert frame.shape == want.shape
            # 4:2:0 halves the resolution of colour, so edges differ; elsewhere a level or two.
            assert np.median(np.abs(frame.astype(int) - want)) <= 3
            assert np.mean(np.abs(frame.astype(int) - want)) <= 6


def test_picture_has_imagined_left_true_right_and_scores_above() -> None:
    video = example_videos()[0]
    shown = videos.picture(video, 6)
    height, width = shown.shape[:2]
    side = 256  # 16 px, enlarged 16 times
    assert (width, height) == (2 * side + 8, side + 40)
    pictures = shown[-side:]
    np.testing.assert_array_equal(pictures[::16, :side:16], video.imagined[6])
    assert video.true is not None
    np.testing.assert_array_equal(pictures[8::16, side + 8 :: 16], video.true[6])
    strip = shown[:36]
    column = [int((t + 0.4) * width / 12) for t in range(12)]
    heights = [int((strip[:28, x] != videos._PAPER).any(axis=1).sum()) for x in column]
    assert heights == sorted(heights)
    assert heights[0] <= 2 < 24 <= heights[-1]
    colour = [tuple(strip[27, x]) for x in column]
    assert colour[2] == videos._SCORE  # below the threshold
    assert colour[6] == videos._ABOVE  # above it
    assert colour[7] == videos._DIM  # not yet
    assert [tuple(strip[32, x]) == videos._DIM for x in column] == [False] * 9 + [True] * 3  # success is to come
    assert tuple(videos.picture(video, 11)[32, column[9]]) == videos._TRUE


def test_odd_pictures_are_padded() -> None:
    frames = np.zeros((2, 301, 303, 3), np.uint8)
    clip = videos.encode(reports.Video("odd", "", frames))
    assert clip.size == (304, 302)
    assert not clip.has_strip
    assert not clip.has_true


def test_same_frames_give_the_same_file_whatever_lies_in_fresh_memory() -> None:
    program = "import hashlib, test_report as t; print(hashlib.sha256(t.videos.encode(t.example_videos()[0]).mp4).hexdigest())"
    files = {
        subprocess.run(
            [sys.executable, "-c", program], cwd=Path(__file__).parent, env={**os.environ, "MALLOC_PERTURB_": fill}, capture_output=True, check=True
        ).stdout
        for fill in ("0", "1", "2")  # glibc fills what it hands out with the complement
    }
    assert len(files) == 1


def test_videos_of_an_earlier_report_go(a_copy: Path) -> None:
    (a_copy / "videos/mine.mp4").write_bytes(b"kept")
    reports.write(a_copy, example(), None, example_videos()[1:])
    assert sorted(path.name for path in (a_copy / "videos").iterdir()) == ["01-imagined-alone.mp4", "index.json", "mine.mp4"]


# Refusals


def test_nothing_is_overwritten_when_the_disk_refuses(a_copy: Path) -> None:
    before = {path: path.read_bytes() for path in a_copy.rglob("*") if path.is_file()}
    changed = example()
    changed["seed"] = 8
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # the page is larger, report.json is not
    try:
        with pytest.raises(reports.ReportError, match=r"report not written, .*report\.html: File too large; free space"):
            reports.write(a_copy, changed, example_figures(), example_videos())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path: path.read_bytes() for path in a_copy.rglob("*") if path.is_file()} == before


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "figures").write_text("not a folder")
    with pytest.raises(reports.ReportError, match="figures: no folder; move it away"):
        reports.write(tmp_path, example())
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize(("name", "code"), [("report.json", 2), ("report.html", 1), ("figures/success.svg", 1), ("videos/index.json", 2)])
def test_a_folder_in_the_way_is_named_before_anything_is_overwritten(name: str, code: int, a_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command says of what it reads that it is no good (2), and of what it writes that the disk refuses (1)."""
    (a_copy / name).unlink()
    (a_copy / name).mkdir()
    before = {path: path.read_bytes() for path in a_copy.rglob("*") if path.is_file()}
    changed = example()
    changed["seed"] = 8
    with pytest.raises(reports.ReportError, match=f"report not written, .*{name}: a folder is in its place; move it away"):
        reports.write(a_copy, changed, example_figures(), example_videos())
    assert main([str(a_copy)]) == code
    said = capsys.readouterr().err
    assert f"{a_copy / name}: " in said
    assert said.count("\n") == 1
    assert {path: path.read_bytes() for path in a_copy.rglob("*") if path.is_file()} == before


def test_a_name_that_cannot_be_taken_is_named(a_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of all files is not the one to blame."""
    replace = Path.replace

    def refuse(path: Path, target: Path) -> Path:
        if target.name == "report.html":
            raise PermissionError(1, "Operation not permitted", str(path), None, str(target))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(reports.ReportError, match=r"report not written, .*/report\.html: Operation not permitted"):
        reports.write(a_copy, example(), example_figures(), example_videos())


def test_an_invalid_report_writes_nothing(tmp_path: Path) -> None:
    broken = example()
    del broken["commit"]
    with pytest.raises(ValueError, match="commit is missing"):
        reports.write(tmp_path / "run", broken)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["truncate", "list", "field"])
def test_damaged_record_is_named(a_copy: Path, damage: str) -> None:
    path = a_copy / "report.json"
    text = path.read_text()
    path.write_text({"truncate": text[: len(text) // 2], "list": "[1]", "field": text.replace('"commit"', '"comit"')}[damage])
    with pytest.raises(ValueError, match=r"report\.json: .*; make it again \(worldenv-train --resume RUN --only report\)"):
        reports.rebuild(a_copy)


def test_lost_video_is_named(a_copy: Path) -> None:
    (a_copy / "videos/02-imagined-alone.mp4").unlink()
    with pytest.raises(ValueError, match=r"index\.json: damaged, or a video is gone .*02-imagined-alone"):
        reports.rebuild(a_copy)


# Command


def test_command_shows_and_rebuilds(a_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (a_copy / "report.html").unlink()
    assert main([str(a_copy)]) == 0
    said = capsys.readouterr().out
    assert (a_copy / "report.html").is_file()
    assert findings.verdict(example()) in said
    assert "289/600" in said
    assert json.loads(said.splitlines()[-1])["paired"] == example()["eval"]["paired"]


def test_command_compares(a_copy: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = json.loads((a_copy / "report.json").read_text())
    changed["seconds_total"] = 1.0
    (a_copy / "report.json").write_text(json.dumps(changed))
    assert main(["--compare", str(run), str(a_copy)]) == 0
    assert json.loads(capsys.readouterr().out)["differences"] == 0
    changed["loop"]["returns"][2] = 0.48
    (a_copy / "report.json").write_text(json.dumps(changed))
    assert main(["--compare", str(run / "report.json"), str(a_copy)]) == 1
    assert capsys.readouterr().out.startswith("loop.returns[2]: 0.47 | 0.48\n")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "--compare A B"),
        (["/no/such/run"], "/no/such/run: no such file"),
        (["--compar", "a", "b"], "did you mean '--compare'"),
        (["x", "--compare", "a", "b"], "--compare A B"),
    ],
)
def test_command_refuses_in_one_line(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("worldenv-report: ")
    assert says in error
    assert error.count("\n") == 1


# Record


def test_versions_are_text() -> None:
    found = reports.versions("llvmpipe")
    assert found["renderer"] == "llvmpipe"
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["numpy"] == np.__version__
    assert int(found["cores"]) >= 1
    assert {"worldenv", "torch", "triton", "transformers", "diffusers", "peft", "mujoco", "cpu", "gpu", "system"} <= found.keys()
    assert all(isinstance(value, str) and value for value in found.values())


def commit_seen_from(tree: Path) -> str:
    """What commit() says in a source tree that holds a copy of its file."""
    place = tree / "worldenv/report/record.py"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(Path(record.__file__).read_bytes())
    spec = importlib.util.spec_from_file_location("a_copy_of_record", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.commit())


def test_commit_is_that_of_the_source_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    assert commit_seen_from(tmp_path) == "unknown"  # no repository
    git("init", "-q")
    (tmp_path / "tracked.txt").write_text("one")
    git("add", "tracked.txt")
    git("commit", "-q", "-m", "first")
    assert commit_seen_from(tmp_path) == "unknown"  # a repository of something else, in whose folder we are installed
    git("add", ".")
    git("commit", "-q", "-m", "second")
    head = git("rev-parse", "HEAD")
    assert len(head) == 40
    assert commit_seen_from(tmp_path) == head
    (tmp_path / "new.txt").write_text("a run's folder may lie in the tree")
    assert commit_seen_from(tmp_path) == head
    rows = tmp_path / "benchmarks" / "results" / "rows.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text("{}\n")
    git("add", ".")
    git("commit", "-q", "-m", "third")
    head = git("rev-parse", "HEAD")
    rows.write_text("{}\n{}\n")
    assert commit_seen_from(tmp_path) == head  # one more row
    (tmp_path / "tracked.txt").write_text("two")
    assert commit_seen_from(tmp_path) == f"{head}+dirty"
    monkeypatch.setenv("GIT_DIR", "/no/such/repository")
    assert commit_seen_from(tmp_path) == f"{head}+dirty"
    monkeypatch.setenv("PATH", "/no/such/folder")
    assert commit_seen_from(tmp_path) == "unknown"


_MEMORY = """
import contextlib, os, subprocess, sys, time
from worldenv.report.record import PeakMemory, tree_rss_mb

HOLD = "import sys; held = bytearray(b'x') * {mb}_000_000; print('ready', flush=True); sys.stdin.read()"

@contextlib.contextmanager
def holding(mb, nested=False):  # a child, or a child's child, holds mb MB while the block runs
    command = [sys.executable, "-S", "-E", "-c", HOLD.format(mb=mb)]
    if nested:
        command = [*command[:-1], f"import subprocess; subprocess.run({command!r})"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"ready\\n"
        yield
        child.stdin.close()

def wait_for(memory, mb):  # a busy machine may let the sampler wait
    until = time.monotonic() + 30
    while memory.peak_mb < mb and time.monotonic() < until:
        time.sleep(0.01)

"""


def measured_alone(body: str) -> list[float]:
    """What `body` prints, in a process of its own: in this one a child of an earlier test may end meanwhile, and the sum falls."""
    done = subprocess.run([sys.executable, "-c", _MEMORY + body], capture_output=True, text=True, check=True, timeout=200)
    return [float(word) for word in done.stdout.split()]


def test_peak_memory_sees_a_child_and_its_child() -> None:
    before, alone, both = measured_alone("""
with PeakMemory(0.05) as memory:
    before = memory.peak_mb
    with holding(200):
        wait_for(memory, before + 195)
        alone = memory.peak_mb
        with holding(150, nested=True):
            wait_for(memory, before + 340)
print(before, alone, memory.peak_mb)
""")
    assert 195 < alone - before < 260
    assert 340 < both - before < 460


def test_peak_memory_remembers_what_was_freed() -> None:
    before, peak, after = measured_alone("""
with PeakMemory(0.02) as memory:
    before = memory.peak_mb
    held = bytearray(b"x") * 160_000_000
    wait_for(memory, before + 150)
    del held
print(before, memory.peak_mb, tree_rss_mb())
""")
    assert 150 < peak - before < 400
    assert after < peak - 100


def test_peak_memory_without_lists_of_children() -> None:
    """Kernels without /proc/PID/task/TID/children: the parents in /proc/PID/stat lead to the same processes."""
    before, fast, slow = measured_alone("""
before = tree_rss_mb()
with holding(200, nested=True):
    fast = tree_rss_mb()
    os.path.exists = lambda path: False
    slow = tree_rss_mb()
print(before, fast, slow)
""")
    assert slow == pytest.approx(fast, rel=0.02)
    assert slow > before + 200


def test_peak_memory_wants_a_time_between_samples() -> None:
    with pytest.raises(ValueError, match="interval_s=0"):
        reports.PeakMemory(0)


def test_report_knows_no_network() -> None:
    program = "import sys, worldenv.report; print(*sorted(name for name in sys.modules if name.startswith('worldenv.')))"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT).stdout.split()
    rooms = {name.split(".")[1] for name in loaded}
    assert rooms <= {"nouns", "config", "checkpoint", "report"}


def test_manual_names_every_field() -> None:
    manual = (ROOT / "docs/reading-a-report.md").read_text()
    missing = [field.path for field in reports.FIELDS if f"`{field.path.split('.')[-1].removesuffix('?')}`" not in manual]
    assert not missing
