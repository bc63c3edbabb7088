"""A run whose stages up to reward are done in a second: real networks of the tiny preset's sizes, with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from small_policy import statistics
from test_simulator import trained

from worldenv import checkpoint, noise
from worldenv.benchmarks.networks import randomised
from worldenv.config import RunConfig
from worldenv.kinematics import ControllerModel
from worldenv.policy import weights as policies
from worldenv.policy.openvla_oft import OpenVLAOFT
from worldenv.policy.processing import PromptTokenizer
from worldenv.reflector import weights as reflectors
from worldenv.run import Run
from worldenv.simulator import weights as simulators
from worldenv.stages.desk import open_env


def untrained_run(out: Path, settings: RunConfig) -> Path:
    """Make it in `out`, and leave it."""
    run, env = Run(out, settings), open_env(settings.env)
    for name in ("demos", "scale", "explore", "world", "reward"):
        with run.at_work(name, "random weights") as stage:
            if name == "scale":
                policy = OpenVLAOFT.create(
                    settings.policy, PromptTokenizer.build(env.tasks), statistics(), noise.torch_seed(0, noise.Stream.WEIGHTS), torch.device("cpu")
                )
                randomised(policy.network)
                policies.save(stage.folder / "policy.safetensors", policy)
            if name == "world":
                checkpoint.save(stage.folder / "simulator.safetensors", simulators.to_tree(trained(settings.simulator)))
                checkpoint.write_text(stage.folder / "controller.json", json.dumps(ControllerModel.of(env.robot).to_dict()))
            if name == "reward":
                judge = reflectors.initialise(settings.reflector, env.tasks, 0)
                judge.head = reflectors.fresh_head(settings.reflector, 0)
                with torch.no_grad():  # so that it sees differences: of rollouts from one start state some end at once, and some never
                    judge.head.outer.weight.mul_(100.0)
                    judge.head.outer.bias.sub_(3.5)
                checkpoint.save(stage.folder / "reflector.safetensors", reflectors.to_tree(judge))
    env.close()
    run._lock.close()
    return out
