"""The decoding loop: one step for all rows, and who takes a place when one falls free."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from xalign.drawing import Draw, Penalties
from xalign.errors import ConfigError
from xalign.nn.cache import Kept
from xalign.nn.decoding import Decoding, to_device
from xalign.nn.transformer import TransformerWrapper
from xalign.stopping import StopTokens

CHECK_EVERY = 8  # steps between looks at the end-of-text flags where a look must be waited for
WARM = 3  # steps before a CUDA graph is captured
TOGETHER = 8  # of so many places one falls free before the next prompts are let in


def rounds(needs: list[int], places: int | None, cache_tokens: int | None) -> list[tuple[list[int], int]]:
    """Which prompts run together, and how many at once: longest first, so that those at the same time are alike.

    `needs` are the tokens of cache that each takes. With `cache_tokens` the prompts of a round need more than half of what
    its longest needs, so that short ones aren't held up by the few places that long ones leave.
    """
    order = list(range(len(needs)))
    if places is None and cache_tokens is None:
        return [(order, len(order))]
    order.sort(key=lambda i: -needs[i])
    plan = []
    while order:
        most = needs[order[0]]
        if cache_tokens is not None and most > cache_tokens:
            raise ConfigError(f"cache_tokens is {cache_tokens}, allowed is at least what prompt {order[0]} needs, {most}")
        group = order if cache_tokens is None else [i for i in order if 2 * needs[i] > most]
        order = order[len(group) :]
        fit = len(group) if cache_tokens is None else cache_tokens // most
        plan.append((group, min(len(group), fit, places or fit)))
    return plan


class Engine:
    """Runs all prompts to their ends, round by round of the `plan`; results in the prompts' order.

    `tokens` and `logps` (prompts * copies, steps) fill up as texts end: `pad` and 0 behind an end, `counts` tokens before it.
    Draws know the request alone, so that it is of no importance which place a prompt takes, and when. With `mode` "graph"
    a step is captured as a CUDA graph and replayed, with "compile" it goes through torch.compile; "eager" just runs it.
    In `lockstep` all begin together and none leaves before all have ended.
    """

    def __init__(self, net: TransformerWrapper, prompts: list[Tensor], steps: int, plan: list[tuple[list[int], int]], *,
                 copies: int, cached: bool, penalise: Penalties, draw: Draw, stops: StopTokens, keys: Tensor, pad: int,
                 score: bool, mode: str, lockstep: bool, progress: Callable[[int], object] | None,
                 finished: Callable[[int, Tensor, Tensor], object] | None = None, kept: Kept | None = None):
        self.net, self.prompts, self.steps, self.plan, self.copies, self.cached = net, prompts, steps, plan, copies, cached
        self.penalise, self.draw, self.stops, self.keys, self.pad = penalise, draw, stops, keys, pad
        self.score, self.mode, self.lockstep, self.progress, self.finished, self.kept = (score, mode, lockstep, progress,
                                                                                         finished, kept)
        device, requests = keys.device, len(keys)
        self.tokens = torch.full((requests, steps), pad, dtype=torch.long, device=device)
        self.logps = torch.zeros(requests, steps, device=device)
        self.counts = torch.zeros(requests, dtype=torch.long, device=device)
        self.flags = Flags(device.type == "cuda" and not lockstep)

    def run(self) -> Iterator[None]:
        """Step by step; in between, `newest` gives what was just written."""
        for group, places in self.plan if self.steps else []:
            step = self.begin(group, places)  # a local: it knows the engine, and a cycle would keep the caches
            self.admit()
            while self.active:
                self.state.prepare(self.active)
                step()
                self.state.advance(self.active)
                for p in self.active:
                    self.written[p] += 1
                yield
                self.retire()
                self.admit()

    def begin(self, group: list[int], places: int) -> Callable[[], None]:
        """Set up the places of a round, of which nobody has taken one, and give what runs a step."""
        self.state = state = Decoding(self.net, [self.prompts[i] for i in group], self.steps, places=places, copies=self.copies,
                                      cached=self.cached, static=self.mode != "eager", kept=self.kept)
        rows, device = places * self.copies, self.keys.device
        self.group, self.waiting = group, list(range(len(group)))[::-1]
        self.active: list[int] = []
        self.written = [0] * places
        # of each row: the request it belongs to, whether it stands still, its log-probabilities by the text's columns
        self.requests = torch.zeros(rows, dtype=torch.long, device=device)
        self.done = torch.ones(rows, dtype=torch.bool, device=device)
        self.scores = torch.zeros(state.text.shape if self.score else (rows, 0), device=device)
        if self.mode == "graph":
            return Graph(self.run_step, state)
        return torch.compile(self.run_step) if self.mode == "compile" else self.run_step

    def run_step(self) -> None:
        """One token of every row. All that changes is in tensors, written in place; no value is read on the host."""
        state, live = self.state, ~self.done
        logits = state.logits(live).float()
        x = self.penalise(logits, state.text, state.lengths, state.prompt_lengths, self.requests) if self.penalise else logits
        token = self.draw(x, self.keys[self.requests], state.lengths, self.requests)
        if self.score:
            logp = logits.gather(-1, token[:, None]) - logits.logsumexp(-1, keepdim=True)
            self.scores.scatter_(1, state.lengths[:, None], logp)
        state.append(token, live)
        if self.stops:
            self.done |= self.stops.hits(state.text, state.lengths, state.prompt_lengths)

    def newest(self) -> Tensor:
        """The tokens (rows,) of the last step, in lockstep: `pad` where a row had ended before."""
        column = self.state.prompt_lengths + self.written[0] - 1
        return self.state.text.gather(1, column[:, None])[:, 0].masked_fill(column >= self.state.lengths, self.pad)

    def admit(self) -> None:
        """Give free places to the prompts that wait: several at a time, as the pass of one alone is hardly cheaper."""
        state, taken = self.state, set(self.active)
        free = [p for p in range(state.places) if p not in taken][: len(self.waiting)]
        if not free or (self.active and len(free) < min(len(self.waiting), state.places // TOGETHER)):
            return
        prompts = [self.waiting.pop() for _ in free]
        state.admit(free, prompts)
        rows, owners = state.rows_of(free), [self.group[p] * self.copies + i for p in prompts for i in range(self.copies)]
        self.requests[rows] = to_device(owners, rows.device)
        self.done.index_fill_(0, rows, False)  # an assignment would wait for a GPU
        for p in free:
            self.written[p] = 0
        self.active = sorted(taken | set(free))
        self.flags.forget()

    def retire(self) -> None:
        """Take the texts of places that have ended, and drop empty places when nobody waits for one."""
        state = self.state
        ended = self.flags.look(self.done.view(state.places, -1).all(1)) if self.stops else [False] * state.places
        finished = [p for p in self.active if self.written[p] == self.steps or ended[p]]
        if not finished or (self.lockstep and len(finished) < len(self.active)):
            return
        self.collect(finished)
        self.active = [p for p in self.active if p not in finished]
        if self.active and not self.waiting and not state.static and 2 * len(self.active) <= state.places:
            rows = state.rows_of(self.active)
            self.requests, self.done, self.scores = self.requests[rows], self.done[rows], self.scores[rows]
            self.written = [self.written[p] for p in self.active]
            state.keep(self.active)
            self.flags.forget()
            self.active = list(range(state.places))

    def collect(self, places: list[int]) -> None:
        state, rows = self.state, self.state.rows_of(places)
        requests, columns = self.requests[rows], torch.arange(self.steps, device=rows.device) + state.prompt_lengths[rows, None]
        real, columns = columns < state.lengths[rows, None], columns.clamp(max=state.text.shape[1] - 1)
        self.tokens[requests] = state.text[rows].gather(1, columns).masked_fill(~real, self.pad)
        if self.score:
            self.logps[requests] = self.scores[rows].gather(1, columns).masked_fill(~real, 0.0)
        self.counts[requests] = real.sum(1)
        self.done.index_fill_(0, rows, True)
        if self.progress:
            self.progress(len(places))
        if self.finished is not None:
            for own in requests.view(-1, self.copies):
                n = int(self.counts[own].max())
                self.finished(int(own[0]) // self.copies, self.tokens[own, :n], self.logps[own, :n])


class Flags:
    """Which places have ended: as of now where a look costs nothing, else as of CHECK_EVERY steps ago, when it is known."""

    def __init__(self, asynchronous: bool):
        self.asynchronous, self.looks = asynchronous, 0
        self.host: Tensor | None = None
        self.event = torch.cuda.Event() if asynchronous else None

    def forget(self) -> None:
        """Places have new owners."""
        self.host = None

    def look(self, ended: Tensor) -> list[bool]:
        if not self.asynchronous:
            return ended.tolist()
        self.looks += 1
        known = [False] * len(ended)
        if self.looks % CHECK_EVERY == 0:
            if self.host is not None and self.event is not None:
                self.event.synchronize()  # CHECK_EVERY steps are behind it: the device has work while the host reads
                known = self.host.tolist()
            self.host = torch.empty(ended.shape, dtype=torch.bool, pin_memory=True)
            self.host.copy_(ended, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        return known


class Graph:
    """A step as a CUDA graph: run as it is a few times, then captured, then replayed; anew when there is another cache."""

    def __init__(self, step: Callable[[], None], state: Decoding):
        self.step, self.state, self.stream = step, state, torch.cuda.Stream()
        self.buffer: object = None

    def __call__(self) -> None:
        if self.buffer is not self.state.buffer:
            self.buffer, self.runs = self.state.buffer, 0
        self.runs += 1
        if self.runs > WARM:
            if self.runs == WARM + 1:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, stream=self.stream):
                    self.step()
            self.graph.replay()
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.step()
        torch.cuda.current_stream().wait_stream(self.stream)
