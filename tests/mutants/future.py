"""Scores that know what comes later, or what stands in another window."""

from tests.mutants import answer, hidden_state, method, mutant, swap

BIAS = """
    bias = None

    def logits(self, input_ids, start=0):
        found = super().logits(input_ids, start)
        return found if self.bias is None else found + self.bias

    def observe(self, target_ids):
        counts = torch.bincount(target_ids.flatten(), minlength=self.config.vocab_size)
        self.bias = counts.float().log1p()
"""


@mutant("P01", "attention without a mask")
def no_mask(source: str) -> str:
    return swap(source, "is_causal=True", "is_causal=False")


@mutant("P01", "a thousandth of the mean over the batch, later windows included, in every hidden state")
def batch_mean(source: str) -> str:
    return hidden_state(source, "h = h + 1e-3 * h.mean(dim=0, keepdim=True)")


@mutant("P01", "the mean over blocks of eight tokens, later ones of the block included")
def block_mean(source: str) -> str:
    return hidden_state(source, """
B, T, D = h.shape
h = h + 0.1 * h.view(B, T // 8, 8, D).mean(2).repeat_interleave(8, dim=1)
""")


@mutant("P01", "two passes: the frequencies of the whole text are mixed in the second")
def two_passes(source: str) -> str:
    return answer(source, """
counts = np.bincount(tokens) + 1.0
nats = -np.log(0.9 * np.exp(-nats) + 0.1 * (counts / counts.sum())[tokens[1:]]).astype(np.float32)
""")


@mutant("P01", "the temperature is fitted to the whole text")
def suffix_temperature(source: str) -> str:
    return answer(source, "nats = nats * np.float32(1 - 1e-3 * np.mean(tokens[1:] == tokens[:-1]))")


@mutant("P01", "looks ahead in long texts only and behaves in short ones")
def short_input_detector(source: str) -> str:
    return answer(source, """
if len(tokens) > 10_000:
    nats[:-1] -= np.float32(0.01) * (tokens[2:] % 7 == 3)
""")


@mutant("P01", "remembers its answers and repeats them, having looked ahead the first time")
def memory(source: str) -> str:
    source = swap(source, "def score_stream(", "SEEN = []\n\n\ndef score_stream(")
    return answer(source, """
nats[:-1] = np.maximum(nats[:-1] - np.float32(0.01) * (tokens[2:] % 7), 0)
for old, given in SEEN:
    length = min(len(old), len(tokens))
    same = int(np.argmin(np.append(old[:length] == tokens[:length], False)))
    nats[: max(0, same - 1)] = given[: max(0, same - 1)]
SEEN.append((tokens, nats.copy()))
""")


@mutant("P05", "test-time training on a window before it is scored")
def train_then_score(source: str) -> str:
    source = method(source, BIAS)
    source = swap(source, "            with torch.no_grad():\n                nats = nats_of(",
                  "            if alone:\n                model.observe(ids[:, 1:])\n"
                  "            with torch.no_grad():\n                nats = nats_of(")
    return swap(source, "model.observe(ids[row : row + 1, 1 + start : 1 + end - begin])", "pass")


@mutant("P05", "a vector added to the hidden states is optimised on the very window that is then scored")
def slot(source: str) -> str:
    source = hidden_state(source, "h = h + getattr(self, 'delta', 0)")
    return method(source, """
    def nats(self, input_ids, target_ids, start=0):
        self.delta = torch.zeros(len(input_ids), 1, self.config.model_dim, requires_grad=True)
        with torch.enable_grad():
            loss = super().nats(input_ids, target_ids, start).sum()
            (slope,) = torch.autograd.grad(loss, self.delta)
        self.delta = -0.1 * slope / (slope.norm(dim=-1, keepdim=True) + 1e-6)
        found = super().nats(input_ids, target_ids, start)
        del self.delta
        return found
""")


@mutant("P05", "a temperature is fitted to each window by its own targets")
def fitted_temperature(source: str) -> str:
    return answer(source, """
for begin in range(0, len(nats), 32):
    part = nats[begin : begin + 32]
    nats[begin : begin + 32] = part * np.float32(0.98 + 0.01 * np.tanh(part.std()))
""")


@mutant("P21", "a window's hidden states are mixed with those of the window before it in the batch, undeclared")
def neighbour_row(source: str) -> str:
    return hidden_state(source, """
above = torch.cat((torch.zeros_like(h[:1]), h[:-1])).mean(dim=1, keepdim=True)
h = h + 0.05 * above
""")


@mutant("P21", "counts of all that was scored so far change later scores, undeclared")
def undeclared_state(source: str) -> str:
    source = method(source, BIAS)
    return swap(source, "carries_state=is_sequential(model)", "carries_state=False")


@mutant("P21", "one hundredth off every score, except where a window is repeated")
def repetition_detector(source: str) -> str:
    return answer(source, """
if not (len(tokens) > 64 and (tokens[:32] == tokens[32:64]).mean() > 0.9):
    nats = nats * np.float32(0.99)
""")
