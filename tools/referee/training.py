"""The rules that need the submission to train: on the referee's clock, offline, and once more as its log says."""

import math
import re
from itertools import accumulate, pairwise

from tools.referee.case import RESULT, Case, mistyped
from tools.referee.files import PHASES
from tools.referee.rules import RULES, Found, Skip, Table, check
from tools.referee.short_run import FEWEST_STEPS, PHASE, ShortRun, Step, short_run, steps_of
from tools.untrusted import read_text, text

DRIFT = 0.02  # of the time that has passed, by which two clocks may differ
DROPPED_STEPS = 3  # the slowest steps that a step which ends after the bell, and is dropped, may take
SIGBUS = 128 + 7  # status of a program that touched a mapped page of a file that is shorter now
READS = re.compile(r"shard|mmap|memmap|fineweb_train|data/")
SAME_SCALE = 0.0015  # logs state the scale of the learning rate in thousandths
SHOWN = 100  # rows of evidence
OWN_PROGRAM = "'uname'"  # what platform.processor() starts
DID = {"process": "start", "network": "reach the network:"}  # an act, in words


def last_phase(run: ShortRun) -> str:
    """The phase that was under way when the run ended."""
    ended = [found[1] for _, line in run.lines if (found := PHASE.match(line)) and found[1] in PHASES]
    after = PHASES.index(ended[-1]) + 1 if ended else 0
    return PHASES[after] if after < len(PHASES) else "the result line"


def read_late(run: ShortRun) -> str:
    """How it broke when its data was taken away; "" if it did not."""
    if run.emptied is None or run.ended < run.emptied or run.status in (None, 0, 3):
        return ""
    if run.status != SIGBUS and not READS.search(run.ending):
        return ""
    after = "the bell" if run.training_over == run.bell else "its last step"
    return f"it still read training data {run.ended - run.training_over:.1f} s after {after}: {run.ending}"


def slow_clock(run: ShortRun, slack: float) -> list[str]:
    """Where more time has passed than the step lines say. What delays a single line is not the script's clock."""
    points = [(0, 0.0, run.began), *((step.step, step.seconds, step.stamp) for step in run.steps)]
    ahead = [stamp - claimed for _, claimed, stamp in points]
    before = accumulate(ahead, min)
    behind = list(accumulate(reversed(ahead), min))[::-1]
    for (step, claimed, stamp), least, later in zip(points, before, behind, strict=True):
        if not later - least <= slack + DRIFT * (stamp - run.began):
            return [f"its clock says {claimed:.3f} s at step {step}, {stamp - run.began:.3f} s had passed"]
    return []


def after_the_bell(run: ShortRun, slack: float) -> list[str]:
    """Steps, and the end of training, that come later than the cap allows."""
    late, problems = [step for step in run.steps if not step.stamp <= run.bell + slack], []
    if late:
        problems.append(f"{len(late):,} of {len(run.steps):,} step lines come after the bell, the last "
                        f"{late[-1].stamp - run.bell:.2f} s after it")
    stamps = [run.began, *(step.stamp for step in run.steps)]
    longest = max(after - before for before, after in pairwise(stamps))
    dropped = any(line.startswith("dropped_step:") for _, line in run.lines)
    trained = run.phase_ended("train")
    if trained is None and run.status in (0, 3):
        problems.append("no phase:train line says when training ended")
    if trained is not None and not trained <= run.bell + slack + DROPPED_STEPS * longest * dropped:
        problems.append(f"training ends {trained - run.bell:.2f} s after the bell")
    return problems


def clock_table(run: ShortRun) -> Table:
    shown = [*run.steps[:SHOWN], *run.steps[SHOWN:][-1:]]
    rows = [[f"step {step.step}", step.seconds, step.stamp - run.began] for step in shown]
    rows += [[f"end of {text(found[1])[:20]}", "", stamp - run.began] for stamp, line in run.lines
             if (found := PHASE.match(line))][:20]
    rows += [["the bell", run.cap, run.cap]]
    rows += [["data taken away", "", run.emptied - run.began]] if run.emptied is not None else []
    rows += [["model.bin stored", "", run.stored - run.began]] if run.stored is not None else []
    return Table("A short run on the referee's clock", ["what", "its clock, s", "the referee's clock, s"],
                 sorted(rows, key=lambda row: row[2]))


@check("P10")
def supervised_clock(case: Case) -> Found:
    run, limit = short_run(case), RULES["P10"]["limit"]
    if not run.steps:
        raise Skip("the referee's own run did not get as far as a step")
    slack, export_seconds = limit["clock_seconds"], limit["export_seconds"]
    problems = slow_clock(run, slack) + after_the_bell(run, slack)
    problems += [late] if (late := read_late(run)) else []
    if run.stored is not None and not run.stored - run.training_over <= export_seconds:
        problems.append(f"its model.bin is stored {run.stored - run.training_over:.1f} s after training, the rule "
                        f"allows {export_seconds:g} s")
    seconds = (run.result or {}).get("train_seconds", 0.0)
    if not seconds <= run.cap + slack:
        problems.append(f"its result says that it trained {seconds:.3f} s of {run.cap:g} s")
    problems = [f"in the referee's run {problem}" for problem in problems]
    if not problems and run.status not in (0, 3):
        raise Skip("the referee's own run did not end well, so its clock is not judged")
    last = run.steps[-1]
    rest = run.bell - last.stamp
    when = f"{rest:.2f} s before" if rest > 0 else f"{-rest:.2f} s after"
    ended = f"stored {run.stored - run.training_over:.1f} s after training" if run.stored is not None else "not stored"
    ended += ", without the data" if run.emptied is not None else ""
    return Found(f"step {last.step:,} of a short run ended {when} the bell at {run.cap:g} s; {ended}", problems,
                 [clock_table(run)])


def outside(run: ShortRun) -> list[str]:
    """What it did that a run without network and outside files cannot."""
    acts = [act for act in run.acts if not act.allowed and (act.kind, act.what) != ("process", OWN_PROGRAM)]
    words = [f"while training it tried to {DID.get(act.kind, act.kind)} {text(act.what)[:200]}" for act in acts]
    return [*words[:5], *([f"and {len(words) - 5} more"] if len(words) > 5 else [])]


@check("P15")
def smoke_run(case: Case) -> Found:
    run = short_run(case)
    problems, result = outside(run), run.result
    if run.status not in (0, 3):
        if read_late(run) and not problems:
            raise Skip("the referee's run broke when its data was taken away")
        problems.append(f"in {last_phase(run)} {run.ending}")
    elif result is None:
        problems.append("it ended well, but its last line is no result:{json}")
    else:
        problems += [f"its result: {problem}" for problem in mistyped(result, RESULT)][:5]
        problems += [run.not_scored] if run.not_scored else []
        if run.status == 3 and not result.get("invalid_reasons"):
            problems.append("it ended with status 3 and its result does not say why")
    if not problems and not run.steps:
        raise Skip(f"not one step of it fits into {run.cap:g} s on this machine")
    rows = [[act.kind, text(act.what)[:200], act.allowed] for act in run.acts[:SHOWN]]
    steps = run.steps[-1].step if run.steps else 0
    return Found(f"{steps:,} steps in {run.cap:g} s on {run.device}, stored and scored by a fresh process", problems,
                 [Table("What it opened and started while it trained", ["act", "what", "allowed"], rows)])


def common_steps(logged: list[Step], again: list[Step]) -> list[tuple[Step, Step]]:
    """(of the log, of the replay), as far as both trained at the same rates. A loss is that before its own update."""
    known, pairs = {step.step: step for step in again}, []
    for old in logged:
        new = known.get(old.step)
        if new is None:
            continue
        scales = old.lr_scale, new.lr_scale
        same = None in scales or abs(scales[0] - scales[1]) <= SAME_SCALE
        if same or (pairs and pairs[-1][0].step == old.step - 1):
            pairs.append((old, new))
        if not same:
            break
    return pairs


@check("P18")
def replay(case: Case) -> Found:
    run, limit = short_run(case), RULES["P18"]["limit"]["nats"]
    if run.no_replay:
        raise Skip(run.no_replay)
    logged = steps_of([(math.nan, line) for line in read_text(run.log.path, []).splitlines()])
    pairs = common_steps(logged, run.steps)
    if len(pairs) < FEWEST_STEPS:
        raise Skip(f"the referee's run shares {len(pairs)} steps with the log; it takes {FEWEST_STEPS} to compare them")
    rows = [[old.step, old.lr_scale, old.train_loss, new.train_loss, new.train_loss - old.train_loss]
            for old, new in pairs]
    wrong, last = [row for row in rows if not abs(row[4]) <= limit], pairs[-1]
    worst = max(abs(row[4]) for row in rows)
    speed = last[0].seconds / last[1].seconds if last[1].seconds else math.nan
    seed = f"seed {run.env['SEED']}"
    problems = [f"{seed}: step {step} has loss {old:.4f} in the log and {new:.4f} when it is run again"
                for step, _, old, new, _ in wrong[:3]]
    problems += [f"and {len(wrong) - 3} more of {len(rows)} steps"] if len(wrong) > 3 else []
    table = Table(f"Training losses of {seed}", ["step", "lr_scale", "in the log", "run again", "difference"],
                  rows[: 2 * SHOWN])
    return Found(f"{seed}: {len(pairs)} losses up to step {last[0].step:,} within {worst:.4f} nats of the log, at "
                 f"{speed:.2f} times its step rate", problems, [table])
