"""Stage reward: the reflector, or the classifier that stands in for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from worldenv import audit, checkpoint
from worldenv.data.episode import Episode
from worldenv.learning import frame_classifier, reward_head
from worldenv.reflector import classifier
from worldenv.reflector import weights as reflectors
from worldenv.reflector.classifier import ClassifierReflector
from worldenv.reflector.judge import LlavaReflector
from worldenv.run import Stage
from worldenv.stages.desk import Desk
from worldenv.stages.fleet import Imagining, imagining

Drawn = list[NDArray[np.uint8]]
"""Videos of episodes as the simulator draws them, each like the episode's own frames."""


def reward(desk: Desk, stage: Stage) -> None:
    """The reflector learns to see success, in true frames and in those that the simulator imagines of the same commands."""
    settings, (training, held_out) = desk.settings, desk.explored
    training = [*desk.episodes("demos"), *training]

    @functools.cache
    def imagined() -> Imagining:
        return imagining(desk, stage.folder)

    @functools.cache
    def drawn() -> Drawn:
        return audit.imagine_episodes(imagined().worlds, training, settings.loop.slots, settings.policy.chunk, "imagine")

    reflector: LlavaReflector | ClassifierReflector
    if settings.reward.judge == "classifier":
        reflector = ClassifierReflector.initialise(settings.reflector, settings.reward.classifier_width, desk.site.tasks, desk.seed).to(desk.device)
        stage.metrics["classifier"] = frame_classifier.train_classifier(
            reflector, training, settings.reward, desk.seed, stage.savepoint("classifier"), drawn()
        )
        tree = classifier.to_tree(reflector)
    else:
        reflector = fitted_llava(desk, stage, training, drawn)
        tree = reflectors.to_tree(reflector)
    checkpoint.save(stage.folder / "reflector.safetensors", tree)
    judges = [reflector, *(desk.reflector(device) for device, parts in desk.places if "reflector" in parts and device != desk.devices[0])]
    chunk, eta = settings.policy.chunk, reflector.config.threshold
    scores = reward_head.score(judges, held_out, chunk=chunk)
    stage.metrics |= reward_head.measure(scores, held_out, eta)
    drawn_held_out = audit.imagine_episodes(imagined().worlds, held_out, settings.loop.slots, chunk, "imagine held-out")
    stage.metrics["drawn"] = reward_head.measure(reward_head.score(judges, held_out, drawn_held_out, chunk), held_out, eta)
    stage.metrics["engines"] = imagined().engines
    success = np.concatenate([e.success[1:] for e in held_out])
    checkpoint.save(stage.folder / "held-out.safetensors", {"score": np.concatenate(scores), "success": success})


def fitted_llava(desk: Desk, stage: Stage, training: Sequence[Episode], drawn: Callable[[], Drawn]) -> LlavaReflector:
    """Backbone, then head; `drawn` is asked where one of them is still to be taught."""
    settings = desk.settings
    half_done = stage.savepoint("half-done")
    if (kept := half_done.load("reflector", "metrics")) is not None:
        reflector = reflectors.from_tree(kept["reflector"], "the half-done stage reward").to(desk.device)
        stage.metrics["backbone"] = kept["metrics"]
    elif settings.reward.start:
        dtype = torch.bfloat16 if settings.reward.precision == "bfloat16" else torch.float32
        reflector = reflectors.open_directory(Path(settings.reward.start), settings.reflector, dtype).to(desk.device)
        stage.metrics["backbone"] = {"start": settings.reward.start, "parameters": sum(p.numel() for p in reflector.llava.parameters())}
    else:
        reflector = reflectors.initialise(settings.reflector, desk.site.tasks, desk.seed).to(desk.device)
        stage.metrics["backbone"] = reward_head.train_backbone(reflector, training, settings.reward, desk.seed, stage.savepoint("backbone"), drawn())
        half_done.save({"reflector": reflectors.to_tree(reflector), "metrics": stage.metrics["backbone"]})
    if settings.reward.head:
        stage.metrics["head"] = reward_head.fit_head(reflector, training, settings.reward, desk.seed, stage.savepoint("head"), drawn)
    return reflector
