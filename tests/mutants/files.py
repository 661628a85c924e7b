"""Records whose files do not hold what they should, or hold more."""

import base64
import json
import shutil
import zlib
from pathlib import Path
from statistics import pstdev

from tests.mutants import change_json, change_result, edit, first_log, in_all, method, mutant, result_of, swap


@mutant("P12", "a helper beside the script that nobody counted", "record")
def helper(folder: Path) -> None:
    (folder / "ngram.cpp").write_text("int main() {}\n")


@mutant("P12", "a size that is not that of what ships", "record")
def smaller_in_json(folder: Path) -> None:
    in_all(folder, lambda result: {"bytes_code": result["bytes_code"] - 20_000,
                                   "bytes_total": result["bytes_total"] - 20_000})
    said = json.loads((folder / "submission.json").read_text())
    change_json(folder, bytes_code=said["bytes_code"] - 20_000, bytes_total=said["bytes_total"] - 20_000)


@mutant("P13", "a second packed layer inside the script")
def hidden_layer(source: str) -> str:
    inner = base64.b85encode(zlib.compress(b"HIDDEN = 1\n")).decode()
    layer = f"import base64\nexec(zlib.decompress(base64.b85decode({inner!r})))\n"
    return swap(source, "gc.enable()\n", f"{layer}gc.enable()\n")


@mutant("P13", "a readable copy that is not what runs", "record", compressed=True)
def other_copy(folder: Path) -> None:
    path = folder / "train_gpt_readable.py"
    path.write_text(path.read_text().replace("is_causal=True", "is_causal=True "))


@mutant("P14", "a date that is not the folder's", "record")
def other_date(folder: Path) -> None:
    change_json(folder, date="2026-01-01")


@mutant("P14", "no README", "record")
def no_readme(folder: Path) -> None:
    (folder / "README.md").unlink()


@mutant("P16", "one run filed as two seeds", "record")
def one_run_twice(folder: Path) -> None:
    log = folder / "logs/train_seed42.log"
    shutil.copy(first_log(folder), log)
    edit(log, r'"seed": 1337', '"seed": 42')
    change_result(log, seed=42)


@mutant("P16", "a log of another seed than its name says", "record")
def other_seed(folder: Path) -> None:
    first_log(folder).rename(folder / "logs/train_seed7.log")


@mutant("P16", "a log without its last line", "record")
def cut_log(folder: Path) -> None:
    log = first_log(folder)
    log.write_text("\n".join(log.read_text().splitlines()[:-1]) + "\n")


@mutant("P17", "the best seed in place of the mean", "record", seeds=(1337, 42, 7))
def best_seed(folder: Path) -> None:
    best = min((result_of(log) for log in folder.glob("logs/*.log")), key=lambda result: result["val_bpb"])
    change_json(folder, val_bpb=best["val_bpb"], val_loss=best["val_loss"])


@mutant("P17", "the deviation of a population in place of a sample's", "record", seeds=(1337, 42, 7))
def population_deviation(folder: Path) -> None:
    scores = [result_of(log)["val_bpb"] for log in folder.glob("logs/*.log")]
    change_json(folder, val_bpb_std=pstdev(scores))


@mutant("P17", "three of five runs shown", "record", seeds=(1337, 42, 7))
def hidden_runs(folder: Path) -> None:
    said = json.loads((folder / "submission.json").read_text())
    hidden = {"run_id": "tried_too", "seed": 3, "val_bpb": 9.0, "status": "scored"}
    change_json(folder, all_runs=[*said["all_runs"], hidden])


@mutant("P22", "three hundred numbers that no run made, in the script")
def constants(source: str) -> str:
    numbers = ", ".join(f"{(i * 7919 % 1000) / 1000}" for i in range(300))
    return swap(source, "gc.enable()\n", f"TABLE = [{numbers}]\ngc.enable()\n")


@mutant("P23", "fifty thousand parameters that nothing reads")
def unread_weights(source: str) -> str:
    source = method(source, """
    def __init__(self, config):
        super().__init__(config)
        self.spare = nn.Parameter(torch.randn(200, 250))
""")
    return source


@mutant("P25", "a seed that looks searched for", "nothing", seeds=(2884431328,))
def searched_seed() -> None: ...


@mutant("P25", "a score after quantisation that is better than before", "record")
def better_quantised(folder: Path) -> None:
    in_all(folder, lambda result: {"pre_quant_val_bpb": result["val_bpb"] + 0.05})
