"""Honest submissions, some of which do what cheats do, within the rules."""

from tests.mutants import honest, method


@honest("the kit's gpt, nothing changed", "nothing", seeds=(1337, 42, 7))
def plain() -> None: ...


@honest("sliding windows: every target has a long past and is scored once", "nothing", settings=dict(EVAL_STRIDE=8))
def sliding_window() -> None: ...


@honest("bytes as tokens", "nothing", vocabulary=None)
def byte_tokens() -> None: ...


@honest("a compressed script with its readable copy", "nothing", compressed=True)
def compressed() -> None: ...


@honest("six bits a weight, untied head", "nothing", settings=dict(QUANT_BITS=6, TIE_EMBEDDINGS=0))
def six_bits() -> None: ...


@honest("one sequence is longer than a batch of the referee's streams", "nothing", settings=dict(EVAL_SEQ_LEN=128))
def long_windows() -> None: ...


@honest("test-time training of all weights, score first", "nothing", settings=dict(TTT_LR=0.3, TTT_TOKENS=96))
def learns_all() -> None: ...


@honest("test-time training of a bias, on what was scored, told by observe")
def score_first(source: str) -> str:
    return method(source, """
    bias = None

    def logits(self, input_ids, start=0):
        found = super().logits(input_ids, start)
        return found if self.bias is None else found + self.bias

    def observe(self, target_ids):
        if self.bias is None:
            self.bias = torch.zeros(self.config.vocab_size, device=target_ids.device)
        with torch.enable_grad():
            bias = self.bias.clone().requires_grad_()
            seen = torch.log_softmax(bias, 0)[target_ids.flatten()]
            (-seen.mean()).backward()
        self.bias = self.bias - 0.5 * bias.grad
""")


@honest("a mixture with the frequencies of what was scored, normalised over the vocabulary")
def normalised_mixture(source: str) -> str:
    return method(source, """
    counts = None

    def logits(self, input_ids, start=0):
        found = super().logits(input_ids, start)
        if self.counts is None:
            return found
        return torch.log(0.9 * found.softmax(-1) + 0.1 * self.counts / self.counts.sum())

    def observe(self, target_ids):
        if self.counts is None:
            self.counts = torch.ones(self.config.vocab_size, device=target_ids.device)
        self.counts = self.counts.index_add(0, target_ids.flatten(), torch.ones(target_ids.numel()))
""")


@honest("a state carried from window to window: the mean embedding of the one before")
def carried_state(source: str) -> str:
    return method(source, """
    state = None

    def backbone(self, x):
        return super().backbone(x) if self.state is None else super().backbone(x) + 0.1 * self.state

    def observe(self, target_ids):
        self.state = self.embed(target_ids).mean(dim=1, keepdim=True)
""")
