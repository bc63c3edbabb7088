"""The story of a run, stage by stage: demonstrations, a policy, a learned world, a judge, LOOP between them, and what came of it.

    demos -> sft -> scale -> explore -> world -> reward -> loop -> eval -> report

A stage reads what earlier stages wrote and writes its own folder; it is skipped when that is there and matches its inputs and settings.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from worldenv import audit, checkpoint, compiled, config, console, evaluation, noise, report
from worldenv.checkpoint import Savepoint
from worldenv.config import DemosConfig, RunConfig
from worldenv.data import collect as data
from worldenv.data.episode import Episode, EpisodeSet
from worldenv.engines.parity import Parity
from worldenv.engines.store import Store
from worldenv.envs import suites
from worldenv.envs.chosen import ChosenTasks
from worldenv.envs.contract import TrueEnvironment
from worldenv.envs.experts import reaching as reach
from worldenv.envs.reaching import STEPS as REACHING_STEPS
from worldenv.envs.reaching import Reaching
from worldenv.envs.true_world import TrueWorld
from worldenv.kinematics import ControllerModel, fit
from worldenv.learning import frame_classifier, processes, reward_head, scale_head, sft, world_model
from worldenv.learning.loop.update import Learner
from worldenv.nouns import Camera, Context
from worldenv.policy import lora
from worldenv.policy import weights as policies
from worldenv.policy.contract import Policy
from worldenv.policy.openvla_oft import OpenVLAOFT
from worldenv.reflector import classifier
from worldenv.reflector import weights as reflectors
from worldenv.reflector.classifier import ClassifierReflector
from worldenv.reflector.contract import Judge
from worldenv.reflector.judge import LlavaReflector
from worldenv.rollout.collect import Assignment, Flight, Flights, Replica, Schedule
from worldenv.rollout.store import RolloutStore, differing
from worldenv.run import Run, RunError, Stage, savepoint_path
from worldenv.simulator import weights as simulators
from worldenv.simulator.evac import Evac
from worldenv.world import ImaginedWorld, World

LOOP_NUMBERS, REPLAY_NUMBERS, RECORD_NUMBERS = 1 << 24, 1 << 31, 3 << 30
"""First rollout numbers of LOOP, of the audit and of what engines are compared on; exploration counts from 0. Numbers are the second half of
noise keys: no two alike."""


def open_env(settings: config.EnvConfig) -> ChosenTasks:
    """The true environment that `settings` name, with the tasks that they choose."""
    whole: TrueEnvironment = suites.open_suite(settings.name, settings.image, config=settings)
    return ChosenTasks(whole, settings.tasks)


@dataclass(frozen=True)
class _Expert:
    """The scripted expert of a suite, which looks into the environment itself."""

    suite: str

    def command(self, env: ChosenTasks, variation: NDArray[np.float64]) -> NDArray[np.float32]:
        """See `data.Expert`."""
        command: NDArray[np.float32] = suites.expert(self.suite).command(env.whole, variation)
        return command


class Desk:
    """What every stage can reach: settings, device, the environment, and what earlier stages left."""

    def __init__(self, run: Run) -> None:
        self.run, self.settings, self.seed = run, run.settings, run.settings.seed
        wanted = self.settings.device
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)

    @functools.cached_property
    def env(self) -> ChosenTasks:
        return open_env(self.settings.env)

    @functools.cached_property
    def camera(self) -> Camera:
        """agentview, which all tasks of a run share: the simulator learns to draw one view."""
        views = [self.env.camera_of(task) for task in range(len(self.env.tasks))]
        for task, view in enumerate(views):
            if not all(np.allclose(getattr(view, name), getattr(views[0], name), atol=1e-6) for name in ("intrinsics", "camera_to_world")):
                first, other = self.env.tasks[0], self.env.tasks[task]
                raise RunError(f"{first!r} and {other!r} are seen by different cameras; choose tasks of one scene with --env.tasks")
        return views[0]

    def episodes(self, stage: Literal["demos", "explore"]) -> EpisodeSet:
        return EpisodeSet(self.run.folder(stage))

    @functools.cached_property
    def explored(self) -> tuple[list[Episode], list[Episode]]:
        """Exploration for training, and held out."""
        episodes = list(self.episodes("explore"))
        held = max(1, round(self.settings.explore.held_out * len(episodes)))
        order = np.argsort(noise.bits(self.seed, 0, 0, 0, noise.Stream.HOLD_OUT, len(episodes)), kind="stable")
        chosen = set(order[:held].tolist())
        return [e for i, e in enumerate(episodes) if i not in chosen], [e for i, e in enumerate(episodes) if i in chosen]

    def policy(self, stage: Literal["sft", "scale", "loop"]) -> OpenVLAOFT:
        return policies.load(self.run.folder(stage) / "policy.safetensors", self.device)

    @functools.cached_property
    def controller(self) -> ControllerModel:
        return ControllerModel.from_dict(json.loads((self.run.folder("world") / "controller.json").read_text()))

    def simulator(self) -> Evac:
        path = self.run.folder("world") / "simulator.safetensors"
        return simulators.from_tree(checkpoint.load(path), str(path)).to(self.device)

    def reflector(self) -> LlavaReflector | ClassifierReflector:
        return reflectors.load_judge(self.run.folder("reward") / "reflector.safetensors").to(self.device)

    def world(self, reflector: Judge | None, simulator: Evac | None = None) -> ImaginedWorld:
        simulator = self.simulator() if simulator is None else simulator
        return ImaginedWorld(simulator, reflector, self.env.robot, self.controller, self.camera, simulator.config.latent, self.seed, self.device)

    def fit_engines(self, folder: Path, policy: OpenVLAOFT, world: World, simulator: Evac | None, reflector: Judge | None) -> compiled.Fitted:
        """Engines for the networks of rollouts of `policy` in `world`, in their places; what was taken is kept in stage folder `folder`."""
        settings, engines = self.settings, self.settings.engines
        if simulator is None:  # the true environment is most of such a rollout
            engines = dataclasses.replace(engines, back_end="eager")
        precision = compiled.precision_of(engines, self.device)
        networks = compiled.of_policy(policy, precision)
        networks += compiled.of_simulator(simulator, precision) if simulator is not None else []
        networks += compiled.of_reflector(reflector, precision)
        tasks = len(self.env.tasks)
        jobs = [Assignment(RECORD_NUMBERS + n, n, self.context(n % tasks, 0)) for n in range(settings.loop.bucket)]

        def rollouts() -> None:
            with self.flights(policy, world, math.inf) as flights:
                list(flights.fly(jobs))

        store = Store(self.run.out / "engines", int(engines.limit_gb * 1e9))
        return compiled.fitted(networks, rollouts, engines, store, self.device, folder / "engines.json", simulator)

    def flights(self, policy: Policy, world: World, threshold: float, keep_frames: bool = False) -> Flights:
        """On this run's schedule."""
        return Flights(
            self.replicas(policy, world), seed=self.seed, steps=self.settings.env.steps, threshold=threshold, schedule=self.schedule,
            keep_frames=keep_frames,
        )  # fmt: skip

    @property
    def schedule(self) -> Schedule:
        """Of every rollout in this run."""
        loop = self.settings.loop
        return Schedule(loop.slots, loop.bucket, loop.judge_bucket, loop.overlap)

    def replicas(self, policy: Policy, world: World) -> list[Replica]:
        """One for each worker: on a CPU all share the networks."""
        return [Replica(policy, world)] * self.schedule.workers(self.device, world)

    def context(self, task: int, index: int) -> Context:
        """Training state `index` of `task`."""
        now = self.env.begin(task, "train", index)
        return Context(self.env.tasks[task], task, index, now.frame, now.pose, now.gripper)


def demos(desk: Desk, stage: Stage) -> None:
    """A scripted expert shows every task a few times."""
    settings = desk.settings
    expert, variation = _Expert(settings.env.name), suites.expert(settings.env.name).VARIATION
    stage.metrics |= data.demonstrate(desk.env, expert, variation, settings.env.steps, settings.demos, desk.seed, stage.folder)


def begun_policy(desk: Desk, episodes: Sequence[Episode], savepoint: Callable[[str], Savepoint]) -> tuple[OpenVLAOFT, dict[str, Any]]:
    """What fine-tuning on `episodes` begins from, and the metrics of its prior: a published policy, or random weights that learn to reach first."""
    settings, env = desk.settings, desk.env
    if settings.sft.start:
        return sft.pretrained(settings.policy, settings.sft, episodes, env.robot, desk.seed, desk.device), {}
    if not settings.sft.prior_steps:
        return sft.untrained(settings.policy, episodes, env.tasks, env.robot, desk.seed, desk.device), {}
    reaching = Reaching(settings.env, 2 * settings.sft.prior_per_task)
    with tempfile.TemporaryDirectory() as folder:  # every process makes its own, the same: they are quicker made than read
        shown = DemosConfig(per_task=settings.sft.prior_per_task)
        data.demonstrate(reaching, reach, reach.VARIATION, REACHING_STEPS, shown, desk.seed, Path(folder) / "prior")
        seen = list(EpisodeSet(Path(folder) / "prior"))
    reaching.close()
    policy = sft.untrained(settings.policy, seen, (*env.tasks, *reaching.tasks), env.robot, desk.seed, desk.device)
    learning = dataclasses.replace(settings.sft, steps=settings.sft.prior_steps, lr=settings.sft.prior_lr, lora_rank=0)
    metrics = sft.sft(policy, seen, env.robot, learning, desk.seed, savepoint("prior"), "prior")
    return sft.retold(policy, episodes, env.robot), {"prior": metrics}


def _fit_policy(desk: Desk, savepoint: Callable[[str], Savepoint]) -> tuple[OpenVLAOFT, dict[str, Any]]:
    episodes = list(desk.episodes("demos"))
    policy, prior = begun_policy(desk, episodes, savepoint)
    return policy, prior | sft.sft(policy, episodes, desk.env.robot, desk.settings.sft, desk.seed, savepoint("fit"))


def fine_tune(desk: Desk, stage: Stage) -> None:
    """The policy imitates the demonstrations; of several processes, all take part."""
    processes.agreed("sft")
    policy, metrics = _fit_policy(desk, stage.savepoint)
    stage.metrics |= metrics
    policies.save(stage.folder / "policy.safetensors", policy, lora.merged(policy.network))
    if desk.settings.sft.lora_rank:
        lora.Adapter.of(policy.network).write(stage.folder / "lora_adapter")


def scale(desk: Desk, stage: Stage) -> None:
    """The scale head learns how far off the policy is."""
    policy, episodes = desk.policy("sft"), list(desk.episodes("demos"))
    stage.metrics |= scale_head.fit_scale_head(policy, episodes, desk.env.robot, desk.settings.scale, desk.seed, stage.savepoint("fit"))
    policies.save(stage.folder / "policy.safetensors", policy)


def explore(desk: Desk, stage: Stage) -> None:
    """The policy acts with its noise in the true environment, past success."""
    settings, policy = desk.settings.explore, desk.run.folder("scale") / "policy.safetensors"
    if settings.processes == 1:
        _explore_part(desk.env, policy, desk.settings, stage.folder, desk.device, (0, 1))
    else:
        data.explore_apart(functools.partial(_explore_apart, policy, desk.settings, stage.folder, desk.device), settings.processes)
    stage.metrics |= data.explored(len(desk.env.tasks), settings, stage.folder)


def _explore_part(env: ChosenTasks, policy: Path, settings: RunConfig, out: Path, device: torch.device, part: tuple[int, int]) -> None:
    data.explore(env, policies.load(policy, device), settings.env.steps, settings.explore, settings.seed, out, device, part)


def _explore_apart(policy: Path, settings: RunConfig, out: Path, device: torch.device, part: tuple[int, int]) -> None:
    """One of several processes: its own scene, its own copy of the policy."""
    _explore_part(open_env(settings.env), policy, settings, out, device, part)


def _world_episodes(desk: Desk) -> tuple[list[Episode], list[Episode]]:
    """What the world model learns from, and what it is judged by."""
    training, held_out = list(desk.episodes("demos")), desk.explored[1]
    return training + (desk.explored[0] if desk.settings.world.extra_data else []), held_out


def _fit_world(desk: Desk, savepoint: Callable[[str], Savepoint]) -> tuple[Evac, dict[str, Any]]:
    training, held_out = _world_episodes(desk)
    return world_model.train(
        desk.settings.simulator, desk.settings.world, training, held_out, desk.camera, desk.env.robot, desk.seed, desk.device, savepoint
    )


def world(desk: Desk, stage: Stage) -> None:
    """Controller, autoencoder and simulator learn how the world moves and looks; of several processes, all take part."""
    training, _ = _world_episodes(desk)
    controller = fit([e.pose for e in training], [e.command for e in training], desk.env.robot, margin_m=0.0)
    checkpoint.write_text(stage.folder / "controller.json", json.dumps(controller.to_dict()))
    processes.agreed("world")
    simulator, metrics = _fit_world(desk, stage.savepoint)
    stage.metrics |= metrics
    checkpoint.save(stage.folder / "simulator.safetensors", simulators.to_tree(simulator))


def reward(desk: Desk, stage: Stage) -> None:
    """The reflector learns to see success, in true frames and in those that the simulator imagines of the same commands."""
    settings, (training, held_out) = desk.settings, desk.explored
    training = [*desk.episodes("demos"), *training]
    imagined = desk.world(None)
    drawn, drawn_held_out = (
        audit.imagine_episodes(imagined, some, settings.loop.slots, settings.policy.chunk, label)
        for some, label in ((training, "imagine"), (held_out, "imagine held-out"))
    )
    reflector: LlavaReflector | ClassifierReflector
    if settings.reward.judge == "classifier":
        reflector = ClassifierReflector.initialise(settings.reflector, settings.reward.classifier_width, desk.env.tasks, desk.seed).to(desk.device)
        stage.metrics["classifier"] = frame_classifier.train_classifier(
            reflector, training, settings.reward, desk.seed, stage.savepoint("classifier"), drawn
        )
        tree = classifier.to_tree(reflector)
    else:
        reflector = _llava(desk, stage, training, drawn)
        tree = reflectors.to_tree(reflector)
    stage.metrics |= reward_head.measure(reflector, held_out)
    stage.metrics["drawn"] = reward_head.measure(reflector, held_out, drawn_held_out)
    scores = np.concatenate(reward_head.score(reflector, held_out))
    success = np.concatenate([e.success[1:] for e in held_out])
    checkpoint.save(stage.folder / "held-out.safetensors", {"score": scores, "success": success})
    checkpoint.save(stage.folder / "reflector.safetensors", tree)


def _llava(desk: Desk, stage: Stage, training: Sequence[Episode], drawn: Sequence[NDArray[np.uint8]]) -> LlavaReflector:
    """Backbone, then head."""
    settings = desk.settings
    half_done = stage.savepoint("half-done")
    if (kept := half_done.load()) is not None:
        reflector = reflectors.from_tree(kept["reflector"], "the half-done stage reward").to(desk.device)
        stage.metrics["backbone"] = kept["metrics"]
    elif settings.reward.start:
        dtype = torch.bfloat16 if settings.reward.precision == "bfloat16" else torch.float32
        reflector = reflectors.open_directory(Path(settings.reward.start), settings.reflector, dtype).to(desk.device)
        stage.metrics["backbone"] = {"start": settings.reward.start, "parameters": sum(p.numel() for p in reflector.llava.parameters())}
    else:
        reflector = reflectors.initialise(settings.reflector, desk.env.tasks, desk.seed).to(desk.device)
        stage.metrics["backbone"] = reward_head.train_backbone(reflector, training, settings.reward, desk.seed, stage.savepoint("backbone"), drawn)
        half_done.save({"reflector": reflectors.to_tree(reflector), "metrics": stage.metrics["backbone"]})
    if settings.reward.head:
        stage.metrics["head"] = reward_head.fit_head(reflector, training, settings.reward, desk.seed, stage.savepoint("head"), drawn)
    return reflector


def _contexts(desk: Desk, iteration: int) -> list[Context]:
    """The start states of one LOOP iteration: spread over the tasks, training states only."""
    loop, tasks = desk.settings.loop, desk.env.tasks
    pool = [(e.task, e.state_index) for e in desk.episodes("demos").entries]
    if loop.context_states == "train":
        pool = [(task, index) for task in range(len(tasks)) for index in range(desk.env.states("train"))]
    chosen = []
    for n in range(loop.contexts):
        mine = [state for state in pool if state[0] == (iteration * loop.contexts + n) % len(tasks)]
        draw = noise.integers(desk.seed, noise.Stream.CONTEXT, iteration * loop.contexts + n, len(mine), 1)
        chosen.append(desk.context(*mine[int(draw[0])]))
    return chosen


@dataclass(frozen=True)
class _Practice:
    """Where LOOP's rollouts happen."""

    world: World
    threshold: float
    """A score above it ends a rollout."""
    engines: compiled.Fitted


def _practice(desk: Desk, policy: OpenVLAOFT, folder: Path) -> _Practice:
    """For `policy`, with engines as stage loop in `folder` took them, or takes them now."""
    simulator: Evac | None = None
    reflector: Judge | None = None
    if desk.settings.loop.control == "true-simulator":
        world: World = TrueWorld(desk.env, desk.device)
        threshold = 0.5
    else:
        simulator, reflector = desk.simulator(), desk.reflector()
        world, threshold = desk.world(reflector, simulator), reflector.config.threshold
    engines = desk.fit_engines(folder, policy, world, simulator, reflector)
    return _Practice(world, threshold if desk.settings.loop.termination else math.inf, engines)


def _snapshot(stage: Stage, iterations: int) -> Path:
    return stage.folder / f"policy-{iterations:04d}.safetensors"


def loop(desk: Desk, stage: Stage) -> None:
    """Algorithm 1: rollouts in the imagined world, leave-one-out advantages, clipped updates of LoRA and heads."""
    settings = desk.settings.loop
    learner = Learner(desk.policy("scale"), settings, desk.seed)
    savepoint = stage.savepoint("iterations")
    history: list[dict[str, float]] = []
    groups: list[dict[str, list[float]]] = []
    seconds: list[float] = []
    if (kept := savepoint.load()) is not None:
        learner.load_tree(kept["learner"])
        history, groups, seconds = kept["history"], kept["groups"], kept["seconds"]
    practice = _practice(desk, learner.policy, stage.folder)
    per, refits = settings.contexts * settings.group, dict[str, Parity]()
    for iteration in (bar := console.track(len(history), settings.iterations, "loop")):
        began = time.monotonic()
        store = RolloutStore(stage.folder / f"iteration-{iteration:04d}.log")
        made = {rollout.number for rollout in store.rollouts}
        contexts = _contexts(desk, iteration)
        jobs = [
            Assignment(LOOP_NUMBERS + iteration * per + n, iteration * settings.contexts + n // settings.group, contexts[n // settings.group])
            for n in range(per)
        ]
        jobs = [job for job in jobs if job.number not in made]
        refits = practice.engines.refit()
        with desk.flights(learner.policy, practice.world, practice.threshold) as flights:
            for flight in flights.fly(jobs):
                store.add(flight.rollout())
        collected = time.monotonic()
        metrics = learner.update(store.rollouts, iteration)
        returns = np.array([rollout.value for rollout in sorted(store.rollouts, key=lambda r: r.number)]).reshape(-1, settings.group)
        history.append({
            "return": float(np.mean(returns)),
            "imagined_success": float(np.mean([r.stopped for r in store.rollouts])),
            "spread": float(np.mean(np.std(returns, axis=1))),
            **metrics,
        })  # fmt: skip
        groups.append({"mean": returns.mean(axis=1).tolist(), "low": returns.min(axis=1).tolist(), "high": returns.max(axis=1).tolist()})
        seconds.append(time.monotonic() - began)
        stage.timings["rollouts_per_second"] = len(jobs) / max(collected - began, 1e-9)
        if settings.snapshot_every and (iteration + 1) % settings.snapshot_every == 0:
            policies.save(_snapshot(stage, iteration + 1), learner.policy, learner.merged())
        savepoint.save({"learner": learner.tree(), "history": history, "groups": groups, "seconds": seconds})
        store.discard()
        bar.note(**{"return": history[-1]["return"], "clip": metrics["clip_fraction"]})
    policies.save(stage.folder / "policy.safetensors", learner.policy, learner.merged())
    learner.export_adapter(stage.folder / "lora_adapter")
    stage.metrics["engines"] = practice.engines.plain
    stage.timings["refit"] = {name: one.plain() for name, one in refits.items()}
    stage.metrics |= {"return_first": history[0]["return"], "return_last": history[-1]["return"], "history": history, "groups": groups}
    stage.timings["seconds_per_iteration"] = float(np.mean(seconds))


def replay(out: Path, settings: RunConfig, number: int) -> dict[str, Any]:
    """Make rollout `number` of the run in `out` once more, alone, and compare it with the stored one.

    Stored are those of LOOP's iteration that is under way, and stage eval's imagined ones. Returns what is JSON-ready: rollout, of, steps,
    differs (names of what is not bit-equal), largest_score_difference. Raises RunError where the rollout is not stored, and as the stages do.
    """
    desk = Desk(Run(out, settings))
    per = settings.report.replays
    if REPLAY_NUMBERS <= number < REPLAY_NUMBERS + 2 * per:
        made, stored, differs, of = _replayed_pair(desk, number, *divmod(number - REPLAY_NUMBERS, per))
    else:
        made, stored, differs, of = _replayed_rollout(desk, number)
    same_steps = made.shape == stored.shape
    return {
        "rollout": number, "of": of, "steps": len(made), "bit_equal": not differs, "differs": differs,
        "largest_score_difference": float((made - stored).abs().max()) if same_steps else None,
    }  # fmt: skip


def _replayed_pair(desk: Desk, number: int, which: int, row: int) -> tuple[torch.Tensor, torch.Tensor, list[str], str]:
    """Scores (T,) made and stored, what differs, and where the stored one lies."""
    name, reflector = ("sft", "loop")[which], desk.reflector()
    path = desk.run.folder("eval") / f"replays-{name}.safetensors"
    if not path.is_file():
        raise RunError(f"rollout {number} is one of stage eval, which has not been done in {desk.run.out}")
    pair, policy = _pairs(path)[row], desk.policy("scale" if name == "sft" else "loop")
    policy.scale_factor = desk.settings.loop.scale_factor
    imagined, _ = _audited(desk, policy, reflector, desk.run.folder("eval"), name)
    made = _alone(desk, policy, imagined, math.inf, Assignment(number, 0, pair.context))
    command, score = torch.cat([query.command for query in made.queries]).cpu().numpy(), made.rollout().score.flatten()
    parts: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {
        "command": (command, pair.command), "frames": (made.frames().numpy(), pair.imagined), "score": (score.numpy(), pair.imagined_score),
    }  # fmt: skip
    differs = [part for part, (ours, theirs) in parts.items() if not np.array_equal(ours, theirs)]
    return score, torch.from_numpy(pair.imagined_score), differs, str(path)


def _replayed_rollout(desk: Desk, number: int) -> tuple[torch.Tensor, torch.Tensor, list[str], str]:
    """As `_replayed_pair`, of the iteration of LOOP that is under way."""
    settings, folder = desk.settings.loop, desk.run.folder("loop")
    kept = Savepoint(savepoint_path(folder, "iterations")).load()
    iteration = 0 if kept is None else len(kept["history"])
    path = folder / f"iteration-{iteration:04d}.log"
    stored = {one.number: one for one in RolloutStore(path).rollouts} if path.is_file() else {}
    if number not in stored:
        under_way = f"{min(stored)} .. {max(stored)} (LOOP's iteration {iteration}, under way), " if stored else ""
        eval_last = REPLAY_NUMBERS + 2 * desk.settings.report.replays - 1
        raise RunError(f"rollout {number} is not stored in {desk.run.out}: there are {under_way}{REPLAY_NUMBERS} .. {eval_last} (stage eval)")
    learner = Learner(desk.policy("scale"), settings, desk.seed)
    if kept is not None:
        learner.load_tree(kept["learner"])
    practice = _practice(desk, learner.policy, folder)
    practice.engines.refit()
    context = _contexts(desk, iteration)[(number - LOOP_NUMBERS) % (settings.contexts * settings.group) // settings.group]
    made = _alone(desk, learner.policy, practice.world, practice.threshold, Assignment(number, stored[number].group, context)).rollout()
    return made.score[made.live], stored[number].score[stored[number].live], differing(made, stored[number]), str(path)


def _alone(desk: Desk, policy: Policy, world: World, threshold: float, job: Assignment) -> Flight:
    """One rollout without any other."""
    with desk.flights(policy, world, threshold, keep_frames=True) as flights:
        (flight,) = flights.fly([job])
    return flight


def evaluate(desk: Desk, stage: Stage) -> None:
    """Greedy success in the true environment before and after LOOP, on the same test states; imagined against true."""
    settings, reflector = desk.settings, desk.reflector()
    eta, chosen = reflector.config.threshold, evaluation.starts(desk.env, settings.eval.episodes)
    outcomes = {
        name: evaluation.evaluate(policy, desk.env, chosen, settings.env.steps, reflector, eta, desk.device, f"eval {name}")
        for name, policy in (("sft", desk.policy("scale")), ("loop", desk.policy("loop")))
    }
    checkpoint.save(stage.folder / "outcomes.safetensors", {name: one.tree() for name, one in outcomes.items()})
    stage.metrics |= {name: one.tally(desk.env.tasks) for name, one in outcomes.items()}
    stage.metrics["paired"] = evaluation.paired(outcomes["sft"].by("oracle"), outcomes["loop"].by("oracle"))
    stage.metrics["curve"] = _curve(desk)
    stage.metrics["world"] = _fidelity(desk, desk.world(reflector), desk.explored[1])
    for i, name in enumerate(("sft", "loop")):
        pairs, engines = _replays(desk, name, stage.folder, REPLAY_NUMBERS + i * settings.report.replays)
        stage.metrics.setdefault("engines", {})[name] = engines
        stage.metrics["world"][f"outcome_agreement_{name}"] = audit.agreement(pairs, desk.env.tasks, eta)
        checkpoint.save(stage.folder / f"replays-{name}.safetensors", [_plain(pair) for pair in pairs])


def _curve(desk: Desk) -> list[dict[str, Any]]:
    """Greedy success in the true environment by LOOP iteration, from the copies that stage loop kept; 0 is the policy that it started from."""
    chosen = evaluation.starts(desk.env, min(desk.settings.eval.curve_episodes, desk.settings.eval.episodes))
    kept = [(0, desk.run.folder("scale") / "policy.safetensors")]
    kept += [(int(path.stem.rpartition("-")[2]), path) for path in sorted(desk.run.folder("loop").glob("policy-*.safetensors"))]
    rows = []
    for iteration, path in kept:
        policy = policies.load(path, desk.device)
        outcome = evaluation.evaluate(policy, desk.env, chosen, desk.settings.env.steps, None, 1.0, desk.device, f"eval iteration {iteration}")
        rows.append({"iteration": iteration, **outcome.tally(desk.env.tasks)["oracle"]})
    return rows


def _fidelity(desk: Desk, imagined: ImaginedWorld, episodes: Sequence[Episode]) -> dict[str, Any]:
    """PSNR by chunk on held-out exploration: imagined, the first frame repeated, and the autoencoder's own reconstruction as ceiling."""
    chunk, reconstruct = desk.settings.policy.chunk, desk.simulator().reconstruct
    ours = [frames[1:] for frames in audit.imagine_episodes(imagined, episodes, desk.settings.loop.slots, chunk, "imagine held-out")]
    still = [np.broadcast_to(e.frame[:1], e.frame[1:].shape) for e in episodes]
    ceiling = [reconstruct(torch.from_numpy(e.frame[1:]).to(desk.device)).cpu().numpy() for e in episodes]
    by = {"psnr_by_chunk": ours, "psnr_copy_first_by_chunk": still, "psnr_ceiling_by_chunk": ceiling}
    return {"episodes": len(episodes), **{name: audit.psnr_by_chunk(frames, episodes, chunk) for name, frames in by.items()}}


def _audited(desk: Desk, policy: OpenVLAOFT, reflector: Judge, folder: Path, name: str) -> tuple[ImaginedWorld, compiled.Fitted]:
    """An imagined world for `policy` and stage eval's engines in it; `name` is of sft or loop."""
    policy.scale_factor = desk.settings.loop.scale_factor
    simulator = desk.simulator()
    imagined = desk.world(reflector, simulator)
    (folder / name).mkdir(exist_ok=True)
    return imagined, desk.fit_engines(folder / name, policy, imagined, simulator, reflector)


def _replays(desk: Desk, name: str, folder: Path, first: int) -> tuple[list[audit.Pair], dict[str, Any]]:
    """Rollouts of policy `name` with LOOP's noise, from training states spread over the tasks, imagined and true; and what ran the imagined ones."""
    policy, reflector = desk.policy("scale" if name == "sft" else "loop"), desk.reflector()
    imagined, engines = _audited(desk, policy, reflector, folder, name)
    tasks, states = len(desk.env.tasks), desk.env.states("train")
    contexts = [desk.context(n % tasks, (n // tasks) % states) for n in range(desk.settings.report.replays)]
    pairs = audit.replay(
        desk.replicas(policy, imagined), desk.env, reflector, contexts, seed=desk.seed, first_number=first,
        steps=desk.settings.env.steps, schedule=desk.schedule, device=desk.device,
    )  # fmt: skip
    return pairs, engines.plain


def _plain(pair: audit.Pair) -> dict[str, Any]:
    context = {f.name: getattr(pair.context, f.name) for f in fields(pair.context)}
    return {**{f.name: getattr(pair, f.name) for f in fields(pair)}, "context": context}


def _pairs(path: Path) -> list[audit.Pair]:
    return [audit.Pair(**{**tree, "context": Context(**tree["context"])}) for tree in checkpoint.load(path)]


def write_report(desk: Desk, stage: Stage) -> None:
    """The record and the page, from what the stages left."""
    records = {name: desk.run.record(name) for name in STAGES if name != "report"}
    metrics = {name: record["metrics"] for name, record in records.items()}
    history = metrics["loop"]["history"]
    measured = dict(metrics["eval"]["world"])
    settings = desk.settings
    written = {
        "preset": settings.preset,
        "seed": settings.seed,
        "fast": settings.fast,
        "settings": config.to_dict(settings),
        "versions": report.versions(desk.env.versions()["renderer"]),
        "commit": report.commit(),
        "seconds_total": sum(record["seconds"] for record in records.values()),
        "peak_rss_mb": max(record["peak_rss_mb"] for record in records.values()),
        "stages": {name: {"seconds": record["seconds"], "peak_rss_mb": record["peak_rss_mb"]} for name, record in records.items()},
        "demos": metrics["demos"],
        "sft": metrics["sft"],
        "scale": metrics["scale"],
        "explore": {**metrics["explore"], "outcomes": report.lengths_by_outcome(desk.episodes("explore").entries)},
        "eval": {name: metrics["eval"][name] for name in ("sft", "loop", "paired")},
        "world": {**metrics["world"], **measured, "outcome_agreement": measured["outcome_agreement_loop"]},
        "reward": metrics["reward"],
        "loop": {
            "returns": [row["return"] for row in history],
            "engines": metrics["loop"]["engines"],
            "metrics": history,
            "curve": metrics["eval"]["curve"],
            "seconds_per_iteration": records["loop"]["timings"]["seconds_per_iteration"],
            "rollouts_per_second": records["loop"]["timings"]["rollouts_per_second"],
        },
        "notes": [*_notes(desk), _run_by(metrics["loop"]["engines"])],
    }
    pairs = _pairs(desk.run.folder("eval") / "replays-loop.safetensors")
    scores = checkpoint.load(desk.run.folder("reward") / "held-out.safetensors")
    figures = report.Figures(score=scores["score"], success=scores["success"])
    report.write(desk.run.out, written, figures, _videos(pairs, desk.reflector().config.threshold, settings.report.videos))
    checkpoint.write_text(stage.folder / "written", "report.json, report.html, figures, videos\n")


def _run_by(engines: dict[str, dict[str, Any]]) -> str:
    """What ran the networks of LOOP's rollouts, and why not something else."""
    by: dict[str, list[str]] = {}
    for name, one in engines.items():
        by.setdefault(one["back_end"], []).append(name)
    said = "; ".join(f"{back_end} ({', '.join(names)})" for back_end, names in by.items())
    why = [one["why"] for one in engines.values() if one.get("why")]
    return f"Rollouts of LOOP were run by {said}." + (f" Not taken: {'; '.join(why)}." if why else "")


def _notes(desk: Desk) -> list[str]:
    settings = desk.settings
    states = f"all {desk.env.states('train')} training states of each task"
    if settings.loop.context_states == "demos":
        states = "the initial states of the demonstrations"
    judge = "the reflector's vision tower and language model on the per-frame labels of training episodes, then frozen before its head was fitted."
    if settings.reward.judge == "classifier":
        judge = "the judge, a frame classifier (the baseline of other systems), on the per-frame labels of training episodes."
    begun = f"The policy began from {settings.sft.start}; every other network" if settings.sft.start else "No pretrained backbone: every network"
    if settings.sft.prior_steps and not settings.sft.start:
        shown = f"{settings.sft.prior_per_task} scripted episodes of each of three reaching tasks in other scenes"
        begun = f"No pretrained backbone: the policy learned from {shown} before it saw a demonstration; every network"
    notes = [
        f"{begun} was trained from scratch in this run; {judge}",
        f"LOOP started from {states}, never from test states.",
        f"Memory is the sum of resident pages over the process tree, sampled; density: scale factor {settings.loop.scale_factor:g}, "
        f"floor {settings.policy.scale_floor:g}, both inside the log-density.",
    ]
    if settings.env.name != "tabletop":
        own, per_task = suites.step_limit(settings.env.name), settings.demos.per_task
        notes.insert(0, (
            f"Environment: {settings.env.name}, {len(desk.env.tasks)} of its tasks; {per_task} scripted demonstrations a task; one view of "
            f"{settings.env.image} px; step limit {settings.env.steps}, where published evaluations have {own}; LIBERO's published initial states, "
            "in order."
        ))  # fmt: skip
    if settings.loop.control != "none":
        notes.append(f"Control: loop.control={settings.loop.control}. This is not the method, but what it is compared with.")
    if not settings.loop.termination:
        notes.append("loop.termination=False: no rollout was ended by the reflector; each was judged at the step limit.")
    if not settings.world.extra_data:
        notes.append("--no-extra-data: the world model saw demonstrations alone.")
    if not settings.reward.head:
        notes.append('--no-reward-head: scores are the probability of "Yes".')
    if settings.fast:
        notes.append("--fast: every stage was cut short; nothing here says anything about success.")
    return notes


def _videos(pairs: Sequence[audit.Pair], eta: float, most: int) -> list[report.Video]:
    """A success, a failure, a false stop, an imagined failure that truly succeeded; then whatever comes next."""

    def kind(pair: audit.Pair) -> str:
        imagined, true = bool((pair.imagined_score > eta).any()), bool(pair.success.any())
        return {(1, 1): "success", (0, 0): "failure", (1, 0): "false stop", (0, 1): "missed success"}[(int(imagined), int(true))]

    ordered: list[audit.Pair] = []
    for turn in range(most):
        for name in ("success", "false stop", "failure", "missed success"):
            ordered += [pair for pair in pairs if kind(pair) == name][turn : turn + 1]
    return [
        report.Video(
            f"{kind(pair)}: {pair.context.instruction}",
            f"Imagined beside true, same commands, training state {pair.context.state_index}; all {len(pair.command)} steps are shown.",
            pair.imagined, pair.true, pair.imagined_score, pair.success, eta,
        )
        for pair in ordered[:most]
    ]  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a stage does and what decides its output."""

    work: Callable[[Desk, Stage], None]
    inputs: tuple[str, ...]
    settings: Callable[[RunConfig], list[Any]]


STAGES: dict[str, Plan] = {
    "demos": Plan(demos, (), lambda c: [c.seed, c.env, c.demos]),
    "sft": Plan(fine_tune, ("demos",), lambda c: [c.seed, c.policy, c.sft]),
    "scale": Plan(scale, ("demos", "sft"), lambda c: [c.seed, c.scale]),
    "explore": Plan(explore, ("scale",), lambda c: [c.seed, c.env, c.explore]),
    "world": Plan(world, ("demos", "explore"), lambda c: [c.seed, c.simulator, c.world]),
    "reward": Plan(reward, ("demos", "explore", "world"), lambda c: [c.seed, c.reflector, c.reward]),
    "loop": Plan(loop, ("demos", "scale", "world", "reward"), lambda c: [c.seed, c.env, c.loop, c.engines]),
    "eval": Plan(evaluate, ("scale", "explore", "world", "reward", "loop"), lambda c: [c.seed, c.env, c.eval, c.report, c.engines]),
    "report": Plan(write_report, ("demos", "sft", "scale", "explore", "world", "reward", "loop", "eval"), lambda c: [c]),
}


def _inputs(name: str, settings: RunConfig) -> tuple[str, ...]:
    """Stages that stage `name` reads: in the true environment LOOP imagines nothing, and the predicate judges."""
    needs = STAGES[name].inputs
    true = name == "loop" and settings.loop.control == "true-simulator"
    return tuple(one for one in needs if one not in ("world", "reward")) if true else needs


def _up_to(last: str, settings: RunConfig) -> list[str]:
    """Stage `last` and all that it is made from, in order."""
    needed, names = {last}, list(STAGES)
    for name in reversed(names[: names.index(last) + 1]):
        needed |= set(_inputs(name, settings)) if name in needed else set()
    return [name for name in names if name in needed]


def train(
    out: Path, settings: RunConfig, first: str | None = None, only: str | None = None, reuse: Sequence[Path] = (), until: str | None = None
) -> None:
    """Run the stages in `out`, or go on there. `first` does that stage and all later ones again, `only` that one alone. With `until`, that stage and
    what it is made from, and none else.

    Of several processes (worldenv.distributed) the first one does this, and the others join it in stage world.
    A stage that a run of `reuse` has done with the same settings and inputs is taken from there, unless it is to be done again.
    Raises RunError, CheckpointError, FloatingPointError or OSError with one line that names the thing and the cure.
    """
    if processes.rank():
        _follow(out, settings)
        return
    run = Run(out, settings)
    names = _up_to(until, settings) if until else list(STAGES)
    order = list(STAGES)
    again = [name for name in names if order.index(name) >= order.index(first)] if first else [only] if only else []
    for name in again:
        run.forget(name)
    desk = Desk(run)
    for name in [only] if only else names:
        plan = STAGES[name]
        fingerprint = run.fingerprint(name, plan.settings(settings), list(_inputs(name, settings)))
        if run.check(name, fingerprint):
            console.say(f"{name:>7}: skipped, done before")
            continue
        if name not in again and run.borrow(name, fingerprint, reuse):
            console.say(f"{name:>7}: taken from another run")
            continue
        with run.at_work(name, fingerprint) as stage:
            plan.work(desk, stage)
    processes.agreed(None)
    if "report" in ([only] if only else names):
        console.say(f"report: {out / 'report.html'}")


def _follow(out: Path, settings: RunConfig) -> None:
    """What every process but the first does: wait until that one begins a stage that all train together, take part, and wait again."""
    run = Run(out, settings, leads=False)
    together: dict[str, Callable[[Desk, Callable[[str], Savepoint]], Any]] = {"sft": _fit_policy, "world": _fit_world}
    while (name := processes.agreed(None)) is not None:
        together[name](Desk(run), _reader(run.folder(name)))


def _reader(folder: Path) -> Callable[[str], Savepoint]:
    return lambda part: Savepoint(savepoint_path(folder, part))
