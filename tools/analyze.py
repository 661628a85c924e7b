"""Looks inside a trained model: spectra, time constants, Lyapunov exponents, sensitivity to tokens, gates over depth.

    python -m tools.analyze MODEL.bin --data FOLDER              on validation text of the model's data set
    python -m tools.analyze MODEL.bin                            on random tokens, where there is no text
    python -m tools.analyze MODEL.bin --out FOLDER --json        JSON and figures go there; the JSON is printed too

Any artifact of any architecture; what a model does not have is left out and said so. It runs on the CPU in fp32.
analysis.json (null or [] = does not apply; layers count from 0 as they run):
  arch artifact_sha256 num_layers model_dim num_windows seq_len notes
  text          name of the data set; null = random tokens
  attention     [{layer module head kv_head, and qk_ and ov_ each with: radius, complex_share, positive_share, trace,
                eigenvalues [[re, im], ...]}]; zero offset, before QK-norm: tools/analysis/spectra.py
  ssm           [{layer module measured tau_p05 tau_p50 tau_p95}], each tau a list over heads or states, in tokens
  lyapunov      {exponents exponents_error (k) in nats per layer, leading_by_layer (L, k), random_by_layer and
                stream_by_layer (L), cumulated, change}: tools/analysis/lyapunov.py
  sensitivity   {matrix (T, T) by target and token, by_distance by_distance_error (T): item d - 1 is of tokens d before
                the target, max_future}: tools/analysis/sensitivity.py
  gates         [{group kind layers channels mean depth_variance total_variance depth_share, and by layer: mean_by_layer
                p05_by_layer p50_by_layer p95_by_layer}]; kind is gate, coefficient or scale
Exit status: 0, or 2 for wrong usage or a file that is no artifact.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import train_gpt
from architectures.layers import LanguageModel
from tools.analysis import figures, gates, lyapunov, sensitivity
from tools.analysis.calls import backbone_input, layers
from tools.analysis.spectra import spectra

SIGNIFICANT = 6  # digits in the JSON
SEQ_LEN = 128  # tokens of a window, unless the model's own is shorter


def text_windows(data: Path, header: dict, num_windows: int, seq_len: int) -> tuple[str, Tensor]:
    """(name of the data set, windows (num_windows, seq_len + 1) spread evenly over its validation text)."""
    dataset = train_gpt.Dataset(str(data), None)
    if header["tokenizer_sha256"] not in (None, dataset.tokenizer_sha256):
        raise ValueError(f"--data {data} has another tokenizer than the model; name the data set it was trained on")
    tokens, _, _ = dataset.validation(None)
    if len(tokens) < seq_len + 1:
        raise ValueError(f"--data {data} has {len(tokens)} validation tokens; --seq-len {seq_len} needs {seq_len + 1}")
    starts = np.linspace(0, len(tokens) - seq_len - 1, num_windows).astype(int)
    return dataset.name, torch.from_numpy(np.stack([tokens[s : s + seq_len + 1] for s in starts]).astype(np.int64))


def random_windows(vocab_size: int, num_windows: int, seq_len: int, seed: int = 0) -> Tensor:
    return torch.randint(vocab_size, (num_windows, seq_len + 1), generator=torch.Generator().manual_seed(seed))


def depth_growth(model: LanguageModel, windows: Tensor, count: int) -> tuple[dict | None, str]:
    """(the Lyapunov section, "") or (None, why there is none)."""
    states, found = lyapunov.stream_states(model), []
    for window in windows:
        x = backbone_input(model, window[None, :-1])
        if x is None:
            return None, "no Lyapunov exponents: the model does not call its backbone"
        try:
            found.append(lyapunov.growth(states, x, count))
        except NotImplementedError as error:  # torch's answer for a kernel that has only a backward
            return None, f"no Lyapunov exponents: {str(error).splitlines()[0]}"
    return lyapunov.report(found), ""


def analyze(model: LanguageModel, windows: Tensor, count: int = 8) -> dict:
    """All measurements of a model ready to score, on token windows (W, T + 1), the `count` leading exponents."""
    inputs = windows[:, :-1]
    if not model.logits(inputs).isfinite().all():
        raise ValueError("the model's logits are not finite, so nothing can be measured; train it again")
    blocks = layers(model, inputs[:1])
    sections = {"attention": spectra(model, inputs[:1]), "ssm": gates.time_constants(model, inputs)}
    sections["lyapunov"], note = depth_growth(model, windows, count)
    per_window = [sensitivity.sensitivity(model, window[:-1], window[1:]) for window in windows]
    sections["sensitivity"] = sensitivity.report(per_window)
    sections["gates"] = [gates.summary(group) for group in gates.groups(model, blocks)]
    kinds = {entry["kind"] for entry in sections["gates"]}
    lacks = {"attention": not sections["attention"], "ssm": not sections["ssm"], "gates": kinds <= {"scale"}}
    notes = [f"no {name}" for name, missing in lacks.items() if missing] + ([note] if note else [])
    about = {"num_layers": len(blocks), "model_dim": model.config.model_dim, "notes": notes}
    return about | {"num_windows": len(windows), "seq_len": inputs.size(1)} | sections


def rounded(value):
    """The same structure with SIGNIFICANT digits in every float."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.{SIGNIFICANT}g}") if isinstance(value, float) else value


def mean_of(entries: list[dict], key: str, layer: int) -> str:
    """The mean of a number or of lists of them over a layer's entries, for the table."""
    values = [np.mean(entry[key]) for entry in entries if entry["layer"] == layer]
    return f"{np.mean(values):.3g}" if values else "-"


def table(found: dict) -> list[str]:
    """The short report: a row per layer, then a line per finding."""
    head = ("layer", "qk_radius", "qk_complex", "ov_radius", "ov_complex", "tau_tokens", "leading", "random", "stream")
    rows = [head]
    growth = found["lyapunov"]
    for i in range(found["num_layers"]):
        heads = ("qk_radius", "qk_complex_share", "ov_radius", "ov_complex_share")
        cells = [mean_of(found["attention"], key, i) for key in heads] + [mean_of(found["ssm"], "tau_p50", i)]
        if growth and i < len(growth["random_by_layer"]):
            by_layer = growth["leading_by_layer"][i][0], growth["random_by_layer"][i], growth["stream_by_layer"][i]
            cells += [f"{value:.3f}" for value in by_layer]
        rows.append((str(i), *cells, *["-"] * (len(head) - 1 - len(cells))))
    lines = ["  ".join(f"{cell:>{len(name)}}" for cell, name in zip(row, head, strict=True)) for row in rows]
    if growth:
        errors = [f"±{error:.3f}" for error in growth["exponents_error"] or []] or [""] * len(growth["exponents"])
        pairs = zip(growth["exponents"], errors, strict=True)
        lines.append(f"exponents: {' '.join(f'{value:+.3f}{error}' for value, error in pairs)} nats per layer")
    seen = found["sensitivity"]
    near = [f"{d}:{seen['by_distance'][d - 1]:.3g}" for d in (1, 2, 4, 8, 16, 32, 64, 128) if d <= found["seq_len"]]
    lines.append(f"sensitivity by distance: {' '.join(near)} | max over the future: {seen['max_future']:.3g}")
    for group in found["gates"]:
        share = "all equal" if group["depth_share"] is None else f"{group['depth_share']:.1%} of the variance"
        spread = group["depth_variance"] ** 0.5
        lines.append(f"{group['kind']} {group['group']}: mean {group['mean']:.3f}, over depth ±{spread:.3g}, {share}")
    return lines + found["notes"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.bin")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="a prepared data folder")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="analysis beside the model by default")
    parser.add_argument("--windows", type=int, default=4, metavar="N")
    parser.add_argument("--seq-len", type=int, metavar="T", help=f"tokens of a window; at most {SEQ_LEN} by default")
    parser.add_argument("--exponents", type=int, default=8, metavar="K")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    for name in ("windows", "seq_len", "exponents"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    try:
        blob = args.model.read_bytes()
        model, _, header = train_gpt.load_artifact(blob, torch.device("cpu"))
        seq_len = args.seq_len or min(SEQ_LEN, model.config.train_seq_len)
        if args.data is None:
            text, windows = None, random_windows(model.config.vocab_size, args.windows, seq_len)
        else:
            text, windows = text_windows(args.data, header, args.windows, seq_len)
        about = {"arch": header["arch"], "artifact_sha256": hashlib.sha256(blob).hexdigest(), "text": text}
        found = rounded(about | analyze(model, windows, args.exponents))
        folder = args.out or args.model.parent / "analysis"
        folder.mkdir(parents=True, exist_ok=True)
        printed = json.dumps(found, allow_nan=False)
        (folder / "analysis.json").write_text(printed + "\n")
        paths = [folder / "analysis.json", *figures.save(found, folder)]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(printed)
        return 0
    where = f"validation text of {text}" if text else "random tokens: name --data for the model's own text"
    shape = f"{found['num_layers']} layers x {found['model_dim']}"
    print(f"{found['arch']}: {shape}, {args.windows} windows of {seq_len}, {where}")
    print("\n".join([*table(found), f"wrote {folder}: {' '.join(path.name for path in paths)}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
