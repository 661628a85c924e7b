"""Runs inside the box in place of the submission: loads its model and tells which tensors of the artifact move a score.

    inspect_weights.py DEVICE SEQ_LEN   beside train_gpt.py, model.bin, tokens.bin (uint16) and names.json, a list of
                                        lists: the names that share one tensor

Prints a JSON line for every list: [its number, the most nats that a score moved, the change that did it, whether all
tensors had to be shaken first]. What it says is believed only as far as tools.referee.weights finds it confirmed: it
runs beside code that may lie to it. It imports nothing of the kit.
"""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch

SHORT = 64  # targets that are enough for most tensors
LEAST = 1e-6  # nats
FAILS = 1e9  # a change after which the model cannot score is a change that it noticed
SHAKE = 0.05  # of a tensor's own size


def load_script() -> object:
    """The submission as a module, whatever it prints."""
    sys.argv[1:] = ["score", "model.bin"]
    spec = importlib.util.spec_from_file_location("submission", "train_gpt.py")
    sys.modules["submission"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_model(module: object, device: torch.device) -> torch.nn.Module:
    loaded = module.load_artifact(Path("model.bin").read_bytes(), device)
    return next(part for part in (loaded if isinstance(loaded, tuple) else (loaded,))
                if isinstance(part, torch.nn.Module))


def changed(value: torch.Tensor, how: str) -> torch.Tensor:
    """Another tensor in place of this one."""
    if value.dtype == torch.bool:
        return ~value
    if not value.is_floating_point():
        other = value.flatten()[torch.randperm(value.numel())].view_as(value)
        return value + 1 if torch.equal(other, value) else other
    if how == "noise":
        return value + torch.randn(value.shape, device=value.device).to(value) * (spread(value) or 0.1)
    return value * (1.5 if how == "scaled" else -1.0)


def spread(value: torch.Tensor) -> float:
    return float(value.double().std(correction=0)) if value.numel() else 0.0


class Inspector:
    """The model, its tensors by name, and the scores that it gives as it is."""

    def __init__(self, device: torch.device, seq_len: int):
        self.module = load_script()
        self.model = load_model(self.module, device)
        self.state = dict(self.model.state_dict())
        is_sequential = getattr(self.module, "is_sequential", lambda model: False)
        self.sequential = is_sequential(self.model)  # learns while it scores, so every look is at a fresh copy
        tokens = torch.from_numpy(np.fromfile("tokens.bin", "<u2").astype(np.int64)).to(device)
        rows = max(1, (len(tokens) - 1) // seq_len)
        windows = [tokens[row * seq_len : (row + 1) * seq_len + 1][None] for row in range(rows)]
        self.looks = [[windows[0][:, : SHORT + 1]], windows]

    def nats(self, windows: list) -> torch.Tensor:
        if hasattr(self.module, "fill_generated"):
            self.module.fill_generated(self.model)
        model, found = copy.deepcopy(self.model) if self.sequential else self.model, []
        torch.manual_seed(0)
        with torch.no_grad():
            for window in windows:
                found.append(model.nats(window[:, :-1], window[:, 1:]).double().flatten())
                if self.sequential:
                    model.observe(window[:, 1:])
        return torch.cat(found)

    def set_base(self) -> None:
        """Remembers the scores as they are now, of few targets if the model takes few, and of all."""
        self.base = []
        for windows in self.looks:
            try:
                first, second = self.nats(windows), self.nats(windows)
            except Exception:  # a model may need whole windows
                if windows is self.looks[-1]:
                    raise
                continue
            self.base.append((windows, first, max(LEAST, 4 * float((first - second).abs().max()))))

    def moves(self, windows: list, base: torch.Tensor) -> float:
        try:
            moved = float((self.nats(windows) - base).abs().max())
        except Exception:
            return FAILS
        return moved if moved <= FAILS else FAILS  # nor is a number that is none

    def most(self, names: list[str]) -> tuple[float, str]:
        """(the most nats that a score moves, by which change) when the tensors of these names change."""
        tensors = {self.state[name].data_ptr(): self.state[name] for name in names if name in self.state}
        kept = [(tensor, tensor.clone()) for tensor in tensors.values() if tensor.numel()]
        most = 0.0
        for windows, base, least in self.base if kept else ():
            for how in ("noise", "scaled", "negated"):
                torch.manual_seed(1)
                for tensor, value in kept:
                    tensor.copy_(changed(value, how))
                most = max(most, self.moves(windows, base))
                for tensor, value in kept:
                    tensor.copy_(value)
                if most > least:
                    return most, how
        return most, ""

    def shake(self) -> None:
        """Moves all tensors a little, so that one that is zero hides no other."""
        torch.manual_seed(2)
        for value in {value.data_ptr(): value for value in self.state.values() if value.is_floating_point()}.values():
            size = float(value.double().square().mean().sqrt()) if value.numel() else 0.0
            value.add_(torch.randn(value.shape, device=value.device).to(value) * SHAKE * (size or 1.0))


def main() -> None:
    device, seq_len = torch.device(sys.argv[1]), int(sys.argv[2])
    names = json.loads(Path("names.json").read_text())
    with torch.no_grad():
        inspector = Inspector(device, seq_len)
        waiting = list(range(len(names)))
        for shaken in (False, True):
            if shaken:
                inspector.shake()
            inspector.set_base()
            hidden = []
            for number in waiting:
                most, how = inspector.most(names[number])
                if how or shaken:
                    print(json.dumps([number, most, how, shaken]), flush=True)
                else:
                    hidden.append(number)
            waiting = hidden
            if not waiting:
                return


main()
