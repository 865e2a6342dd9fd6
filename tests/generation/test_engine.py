import dataclasses
import re
import threading

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from generation.cases import CHUNK, HF, LOCAL, PROMPTS, RNG, adapted, build, by_layer, logits_after

from lljax.build import move
from lljax.errors import ConfigError
from lljax.generation import programs
from lljax.generation.completion import Request
from lljax.generation.engine import Engine
from lljax.generation.programs import program_of
from lljax.generation.sample import Sampling
from lljax.models.by_layer import split_layers
from lljax.models.cache import cache_bytes, empty_cache
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.initialize import initialize
from lljax.parallel.sharding import Layout, make_mesh

MIXED = [
    Request(PROMPTS[0], 30),
    Request(PROMPTS[1], 3, Sampling(temperature=1.0, top_k=20, repetition=1.2, seed=5)),
    Request(PROMPTS[2], 20, Sampling(temperature=0.7, top_p=0.8), logprobs=True),
    Request(PROMPTS[3], 17, Sampling(temperature=2.0, min_p=0.05, seed=9)),
    Request(PROMPTS[1], 12),
]


PREFIX = cache_bytes(build().spec, 4 * CHUNK, jnp.float32)


def engine(model=None, **settings):
    return Engine(model or build(), **{"chunk": CHUNK, "rows": 4} | settings)


WIDE = {"num_hidden_layers": 8, "hidden_size": 120, "intermediate_size": 128}


def deep(split: bool) -> Decoder:
    """Eight layers, wide enough that no activation is as large as a weight."""
    model = Decoder(spec_from_hf(HF | WIDE))
    initialize(model, 0)
    return split_layers(model) if split else model


def alone(request, **settings):
    return engine(**{"rows": 1} | settings).run([request])[0]


def same(completion, other):
    """Equal, but for the last bits of log-probabilities, which depend on the rows of a program."""
    for one, two in zip(completion.logprobs or [], other.logprobs or [], strict=True):
        np.testing.assert_allclose(one.logprob, two.logprob, atol=1e-5)
    return dataclasses.replace(completion, logprobs=None) == dataclasses.replace(
        other, logprobs=None
    )


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "changes,rope_length",
    [
        ({}, None),
        (
            {
                "max_position_embeddings": 16,
                "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
            },
            37 + 12,
        ),
        ({"model_type": "mistral", "sliding_window": 9}, None),
        pytest.param(LOCAL, None, marks=pytest.mark.slow),
    ],
    ids=["full", "dynamic", "window", "chunked"],
)
def test_greedy_decoding_equals_reading_everything_again(changes, rope_length):
    """Across chunks of the prompt and from one size of cache to the next."""
    model = build(**changes)
    for prompt in PROMPTS[:1] if rope_length else PROMPTS:
        (completion,) = engine(model).run([Request(prompt, 12)])
        logits = logits_after(model, prompt, completion.tokens, rope_length=rope_length)
        assert jnp.argmax(logits, axis=-1).tolist() == completion.tokens


def test_requests_beside_each_other_are_as_if_alone():
    together = engine(prefix_bytes=PREFIX).run(MIXED)
    for request, completion in zip(MIXED, together, strict=True):
        assert same(completion, alone(request))
        assert len(completion.tokens) == request.tokens


def test_requests_that_come_and_go_change_nothing():
    """Two rows for nine requests, some cancelled while they wait, are read or are written."""
    running = engine(rows=2)
    growing = [running.submit(request) for request in (*MIXED, *MIXED[:4])]
    for turn in range(200):
        if turn in (2, 9):
            running.cancel(growing[turn - 2])
        if turn == 4:
            running.cancel(growing[8])
        if not running.step():
            break
    cancelled = {0, 7, 8}
    for i, (request, row) in enumerate(zip((*MIXED, *MIXED[:4]), growing, strict=True)):
        completion = row.completion()
        assert (completion.reason == "cancelled") == (i in cancelled)
        wanted = alone(request).tokens
        assert completion.tokens == (wanted[: len(completion.tokens)] if i in cancelled else wanted)
    counts = running.counts()
    assert (counts.waiting, counts.reading, counts.writing) == (0, 0, 0)


def test_a_document_that_many_ask_about_is_read_once():
    document = list(RNG.integers(0, 61, 3 * CHUNK + 2))
    questions = [Request([*document, *PROMPTS[i]], 4) for i in (1, 3, 2)]
    running = engine(prefix_bytes=PREFIX)
    first = running.run(questions[:2])
    assert running.counts().reused == 3 * CHUNK
    assert [*first, *running.run(questions[2:])] == [alone(q) for q in questions]
    assert running.counts().reused == 6 * CHUNK
    for seed in range(3):  # others take the room, and the bytes stay
        running.run([Request(np.random.default_rng(seed).integers(0, 61, 5 * CHUNK), 1)])
    assert running.counts().kept == PREFIX and running.counts().reused == 6 * CHUNK


@pytest.mark.parametrize("settings", [{}, {"cache_dtype": jnp.int8}], ids=["float32", "int8"])
def test_a_prompt_with_several_answers_is_read_once(settings):
    running = engine(rows=3, **settings)
    requests = [
        Request(PROMPTS[0], 7, Sampling(temperature=1.0, seed=3), numbers=(i,)) for i in range(3)
    ]
    growing = [running.submit(request) for request in [*requests, Request(PROMPTS[0], 2)]]
    running.step()
    growing.append(running.submit(dataclasses.replace(requests[0], logprobs=True)))
    running.cancel(growing[1])  # while the prompt is read
    while running.step():
        pass
    assert growing[1].completion().reason == "cancelled"
    del growing[1]
    for one in growing:
        assert same(one.completion(), alone(one.request, **settings))
    # the fourth found a place when the second had gone, and the fifth when others had ended
    assert running.counts().read == 2 * len(PROMPTS[0])
    assert len({tuple(one.completion().tokens) for one in growing}) == 3


def test_the_last_chunk_of_a_prompt_is_read_again_because_its_logits_are_not_kept():
    prompt = RNG.integers(0, 61, 2 * CHUNK)
    running = engine(prefix_bytes=PREFIX)
    first, second = running.run([Request(prompt, 3)]), running.run([Request(prompt, 3)])
    assert first == second and running.counts().reused == CHUNK


def test_a_short_prompt_does_not_wait_for_a_long_one():
    running = engine()
    long = running.submit(Request(RNG.integers(0, 61, 40 * CHUNK), 2))
    running.step()
    pieces = []
    running.submit(Request(PROMPTS[1], 2), pieces.append)
    for _ in range(4):
        running.step()
    assert pieces and long.reason is None
    while running.step():
        pass
    assert long.completion().tokens == alone(long.request).tokens


def test_the_device_is_at_most_a_chunk_ahead(monkeypatch):
    """Or a short prompt would wait until everything is read that has been begun."""
    read, begun = programs.read_prompt, []

    def recorded(*operands):
        logits, cache = read(*operands)
        begun.append(logits)
        return logits, cache

    monkeypatch.setattr(programs, "read_prompt", recorded)
    running = engine(deep(split=False), chunk=256)
    running.submit(Request([3] * 2048, 1))
    while running.step():
        assert all(logits.is_ready() for logits in begun[:-1])
    assert len(begun) == 8


def test_the_oldest_prompt_is_read_though_shorter_ones_keep_coming():
    running = engine(rows=3)
    long = running.submit(Request(RNG.integers(0, 61, 4 * CHUNK), 1))
    for turn in range(60):
        if turn % 2 == 0:
            running.submit(Request(PROMPTS[turn % 4], 1))
        running.step()
    assert long.reason == "length"


def test_logprobs_are_those_of_the_whole_row():
    request = Request(
        PROMPTS[0], 6, Sampling(temperature=1.0, top_k=3), logprobs=True, prompt_logprobs=True
    )
    completion = alone(request)
    whole = [*completion.prompt_logprobs, *completion.logprobs]
    row = [*request.prompt, *completion.tokens]
    logprobs = jax.nn.log_softmax(logits_after(build(), row[:1], row[1:]))
    assert len(whole) == len(row) - 1
    for token, scores, wanted in zip(row[1:], whole, logprobs, strict=True):
        np.testing.assert_allclose(scores.logprob, wanted[token], atol=1e-5)
        np.testing.assert_allclose(
            [p for _, p in scores.top], jnp.sort(wanted)[::-1][:20], atol=1e-5
        )
        assert scores.top[0][0] == jnp.argmax(wanted)


def test_prompts_whose_scores_are_wanted_are_read_though_they_are_known():
    request = Request(PROMPTS[0], 2, prompt_logprobs=True)
    running = engine(prefix_bytes=PREFIX)
    running.run([dataclasses.replace(request, prompt_logprobs=False)])
    (completion,) = running.run([request])
    assert len(completion.prompt_logprobs) == len(PROMPTS[0]) - 1


@dataclasses.dataclass
class Alternating:
    """Even and odd tokens in turn."""

    drawn: list = dataclasses.field(default_factory=list)

    def allowed(self):
        return np.arange(61) % 2 == len(self.drawn) % 2

    def accept(self, token):
        self.drawn.append(token)


def test_a_constraint_holds_for_its_request_alone():
    constrained = [
        Request(PROMPTS[i], 8, Sampling(temperature=1.0), constraint=Alternating()) for i in (0, 3)
    ]
    free = dataclasses.replace(constrained[0], constraint=None)
    *completions, other = engine().run([*constrained, free])
    for completion in completions:
        assert [token % 2 for token in completion.tokens] == [0, 1] * 4
    assert other == alone(free)


def test_adapters_are_chosen_by_request():
    base, other = build(), build(seed=1)
    running = engine(base, prefix_bytes=PREFIX)
    running.add_adapter("other", other)
    requests = [Request(p, 6, adapter=name) for p in PROMPTS[:2] for name in (None, "other")]
    completions = running.run(requests)
    for request, completion in zip(requests, completions, strict=True):
        model = base if request.adapter is None else other
        assert completion == alone(dataclasses.replace(request, adapter=None), model=model)
    growing = running.submit(requests[1])
    running.step()
    running.remove_adapter("other")
    assert growing.completion().reason == "cancelled"
    with pytest.raises(ConfigError, match="there is no adapter 'other', only none"):
        running.submit(requests[1])


def test_adapters_of_one_base_are_decoded_in_one_batch():
    base = by_layer(build(num_hidden_layers=1))
    models = {None: base} | {
        f"r{rank}": adapted(base, rank, also, rank=rank, alpha=4.0, targets=("all-linear",))
        for rank, also in ((2, ()), (3, ("embed", "norm")))
    }
    running, lanes = engine(base), set()
    for name, model in list(models.items())[1:]:
        running.add_adapter(name, model)
    requests = [Request(PROMPTS[1], 9, adapter=name) for name in models]
    growing = [running.submit(request) for request in requests]
    while running.step():
        lanes.add(len(running._lanes._lanes))
    assert lanes <= {0, 1}
    completions = [one.completion() for one in growing]
    assert len({tuple(completion.tokens) for completion in completions}) == 3
    for request, completion in zip(requests, completions, strict=True):
        model = models[request.adapter]
        assert completion == alone(dataclasses.replace(request, adapter=None), model=model)
    running.remove_adapter("r3")
    assert running.run(requests[:2]) == completions[:2]


def test_an_adapter_under_the_name_of_another_reads_its_prompts_anew():
    running, request = engine(prefix_bytes=PREFIX), Request(PROMPTS[0], 6, adapter="a")
    running.add_adapter("a", build(seed=1))
    running.run([request])
    running.remove_adapter("a")
    running.add_adapter("a", build(seed=2))
    wanted = alone(dataclasses.replace(request, adapter=None), model=build(seed=2))
    assert running.run([request]) == [wanted] and running.counts().reused == 0


def test_a_request_for_an_adapter_that_goes_before_it_is_heard_is_cancelled():
    running = engine()
    running.add_adapter("a", build(seed=1))
    growing = running.submit(Request(PROMPTS[1], 3, adapter="a"))
    running.remove_adapter("a")
    running.step()
    assert growing.reason == "cancelled"


@pytest.mark.parametrize(
    "request_,match",
    [
        (Request([], 1), "the prompt is empty"),
        (Request([1], 0), "0 tokens are to be written: ask for at least 1"),
        (Request([1] * 60, 5), "60 tokens and 5 are to be written, and the model reads 64"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_in_one_line(request_, match):
    with pytest.raises(ConfigError, match=match):
        engine(longest=64).submit(request_)


def test_requests_may_come_from_other_threads():
    running, growing = engine(), []
    threads = [
        threading.Thread(target=lambda r=r: growing.append(running.submit(r))) for r in MIXED
    ]
    for thread in threads:
        thread.start()
    while len(growing) < len(MIXED) or any(row.reason is None for row in growing):
        if not running.step():
            running.wait(0.01)
    assert all(same(row.completion(), alone(row.request)) for row in growing)


def test_requests_of_any_length_and_adapter_compile_nothing_more():
    base, compiled = by_layer(build(num_hidden_layers=1)), []
    running = engine(base, prefix_bytes=PREFIX, rows=2)
    running.add_adapter("a", adapted(base, 1, ("norm",), rank=2, alpha=4.0, targets=("q_proj",)))
    running.compile(2 * CHUNK)
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **more: compiled.append(more) if "backend_compile" in name else None
    )
    running.run(
        Request(
            RNG.integers(0, 61, n),
            int(RNG.integers(1, 12)),
            Sampling(seed=int(n)),
            adapter=(None, "a")[n % 2],
        )
        for n in RNG.integers(1, 20, 30)
    )
    assert not compiled


@pytest.mark.parametrize("split", [True, False], ids=["by layer", "stacked"])
def test_a_chunk_is_written_into_the_cache_in_place(split):
    program, weights = program_of(deep(split), jnp.dtype("float32"), None)
    cache = jax.eval_shape(lambda: empty_cache(program.spec, 1, 8192))
    one, chunk = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((1, 16), jnp.int32)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    for lowered in (
        programs.read_prompt.lower(program, weights, cache, chunk, one, one),
        programs.read_drawn.lower(program, weights, cache, one, one),
    ):
        memory = lowered.compile().memory_analysis()
        # a layer's, not all once more
        assert memory.alias_size_in_bytes >= held and memory.temp_size_in_bytes < held / 2


def test_a_token_copies_no_weight():
    program, weights = program_of(deep(split=True), jnp.dtype("float32"), None)
    cache = jax.eval_shape(lambda: empty_cache(program.spec, 1, 64))
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    compiled = programs.read_drawn.lower(program, weights, cache, one, one).compile()
    matrices = [x for x in weights if x.size > 2_000]
    # no copy, transpose or slice of a projection or of an MLP has a place
    of_mlp = WIDE["hidden_size"] * WIDE["intermediate_size"] * 4
    assert compiled.memory_analysis().temp_size_in_bytes < of_mlp / 2
    shapes = {f"f32[{','.join(map(str, x.shape))}]" for x in matrices}
    made = re.findall(r"= (f32\[[\d,]*\])\S* (?!parameter)\w", compiled.as_text())
    assert made and not shapes.intersection(made)


def test_over_a_mesh_as_on_one_device():
    mesh = make_mesh(fsdp=2, data=2, tensor=2)
    model = nnx.clone(build())
    move(model, mesh)
    requests = [Request(prompt, 6) for prompt in PROMPTS[:3]]
    spread = engine(model, layout=Layout(mesh), prefix_bytes=PREFIX).run(requests)
    assert spread == [alone(request) for request in requests]
