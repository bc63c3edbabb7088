"""A LeRobot policy that answers on a pipe. Run by an interpreter that has `lerobot`, which wants another torch than ours: imports nothing of ours.

    python lerobot_server.py PATH DEVICE        PATH is a directory as LeRobot's save_pretrained writes it

It greets with one message, then answers one message by another until its input ends. A message is a length (4 bytes, big-endian), a JSON header of
that many bytes, and the bytes of the arrays that the header lists. Questions carry LIBERO's observation in OpenVLA-OFT's conventions, which are
LeRobot's too: pictures upright and mirrored, state x y z, rotation vector, fingers. An answer is a chunk of commands.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import IO, Any

import numpy as np

STATE = 8
"""Numbers of the state."""
_OF_THE_WRIST = ("wrist", "hand", "gripper")
"""A camera with one of these in its name moves with the gripper."""


def send(stream: IO[bytes], header: dict[str, Any], arrays: dict[str, np.ndarray[Any, Any]] | None = None) -> None:
    """Write one message."""
    whole = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    listed = [[name, array.dtype.str, list(array.shape)] for name, array in whole.items()]
    text = json.dumps({**header, "arrays": listed}).encode()
    stream.write(len(text).to_bytes(4, "big") + text + b"".join(array.tobytes() for array in whole.values()))
    stream.flush()


def _exactly(stream: IO[bytes], size: int) -> bytes:
    parts = []
    while size:
        part = stream.read(size)
        if not part:
            raise EOFError("the other process has ended")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Read one message. EOFError where the stream ends."""
    header = json.loads(_exactly(stream, int.from_bytes(_exactly(stream, 4), "big")))
    arrays = {}
    for name, dtype, shape in header.pop("arrays"):
        kind = np.dtype(dtype)
        arrays[name] = np.frombuffer(_exactly(stream, kind.itemsize * int(np.prod(shape))), kind).reshape(shape)
    return header, arrays


def places(names: list[str]) -> dict[str, str]:
    """Which of our pictures, "frame" or "wrist", each of a policy's views is: by its name, whatever the order. ValueError where the names do not say.

    Two that differ by a number alone (image, image2) are the scene's, then the wrist's, as in LeRobot's sets of LIBERO.
    """
    wrist = [name for name in names if any(word in name.rpartition(".")[2].lower() for word in _OF_THE_WRIST)]
    scene = [name for name in names if name not in wrist]
    if len(names) == 2 and not wrist and len({name.rstrip("0123456789_") for name in names}) == 1:
        scene, wrist = sorted(names, key=lambda name: (len(name), name))[:1], sorted(names, key=lambda name: (len(name), name))[1:]
    if not names or len(wrist) > 1 or len(scene) > 1:
        words = ", ".join(_OF_THE_WRIST)
        raise ValueError(f"views {names}: want one of the scene, one of the wrist (its name has {words}), or both, to be told apart by name")
    return {**dict.fromkeys(scene, "frame"), **dict.fromkeys(wrist, "wrist")}


class Served:
    """The policy. A question is answered as at the start of an episode, by the actions that it would execute before it looked again."""

    def __init__(self, path: str, device: str) -> None:
        """ValueError for a policy that cannot be asked like that."""
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.policies import factory

        config = PreTrainedConfig.from_pretrained(path)
        config.device, config.pretrained_path = device, path
        features = dict(config.input_features)
        self.views = places([name for name in features if name.startswith("observation.image") and "empty_camera" not in name])
        state = features.get("observation.state")
        if state is not None and tuple(state.shape) != (STATE,):
            raise ValueError(f"inputs {list(features)}: want a state of {STATE} (a policy trained on LIBERO)")
        if getattr(config, "n_obs_steps", 1) != 1:
            raise ValueError(f"n_obs_steps={config.n_obs_steps}: only policies that see the present alone (n_obs_steps=1) can be asked")
        if getattr(config, "temporal_ensemble_coeff", None) is not None:
            raise ValueError("temporal_ensemble_coeff is set: only policies that execute their actions open loop can be asked")
        self.kind, self.chunk = str(config.type), int(getattr(config, "n_action_steps", 1))
        self.policy = factory.get_policy_class(config.type).from_pretrained(path, config=config).to(device).eval()
        self.before: Callable[[Any], Any] = lambda observation: observation
        self.after: Callable[[Any], Any] = lambda action: action
        if hasattr(factory, "make_pre_post_processors"):  # before LeRobot 0.4, policies normalise by themselves
            override = {"device_processor": {"device": device}}
            self.before, self.after = factory.make_pre_post_processors(config, pretrained_path=path, preprocessor_overrides=override)
        self.device = device

    def commands(self, task: str, arrays: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        """(K, 7) float32 for one observation: "frame", "wrist" (H, W, 3) uint8, "state" (8,) float32."""
        import torch

        def observation() -> dict[str, Any]:
            pictures = {
                name: torch.from_numpy(arrays[ours].copy()).permute(2, 0, 1)[None].float().div(255).to(self.device)
                for name, ours in self.views.items()
            }
            return {**pictures, "observation.state": torch.from_numpy(arrays["state"].copy())[None].to(self.device), "task": [task]}

        self.policy.reset()
        with torch.inference_mode():  # the first call fills the policy's queue, the others empty it
            chosen = [self.after(self.policy.select_action(self.before(observation()))) for _ in range(self.chunk)]
        return torch.cat([action.reshape(1, -1) for action in chosen]).float().cpu().numpy()


def main() -> None:
    """Serve until the input ends; what goes wrong is a message with "error"."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed goes to stderr
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]  # our modules beside this file would hide others of their names
    try:
        served = Served(sys.argv[1], sys.argv[2])
    except Exception as error:
        send(answers, {"error": f"{type(error).__name__}: {error}"})
        return
    send(answers, {"kind": served.kind, "chunk": served.chunk, "views": 2 if "wrist" in served.views.values() else 1})
    while True:
        try:
            question, arrays = receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            send(answers, {}, {"command": served.commands(question["task"], arrays)})
        except Exception as error:
            send(answers, {"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
