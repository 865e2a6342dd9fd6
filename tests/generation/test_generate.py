import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lljax.build import move
from lljax.generation import generate as module
from lljax.generation.generate import generate, stream
from lljax.generation.sample import Sampling
from lljax.models.cache import empty_cache
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.initialize import initialize
from lljax.parallel.sharding import Layout, make_mesh

HF = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
}
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 61, n) for n in (37, 5, 21, 16)]


@functools.cache
def build(**changes):
    made = Decoder(spec_from_hf(HF | changes))
    initialize(made, 0, deviation=0.3)
    return made


@functools.cache
def local():
    """Layers that slide, layers that are cut into chunks and have no RoPE on every fourth."""
    made = Decoder(
        spec_from_hf(
            HF
            | {
                "model_type": "llama4_text",
                "attention_chunk_size": 8,
                "num_hidden_layers": 4,
                "intermediate_size_mlp": 32,
                "num_local_experts": 4,
                "num_experts_per_tok": 1,
            }
        )
    )
    initialize(made, 0, deviation=0.3)
    return made


@pytest.fixture(autouse=True)
def chunks_of_16(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 16)


def written(*args, **kwargs):
    return [each.tokens for each in generate(*args, **kwargs)]


def test_cached_greedy_decoding_equals_reading_everything_again():
    """Across the edges of prompt chunks, and beyond the original length of a RoPE that depends on
    the length.
    """
    made = Decoder(
        spec_from_hf(
            HF
            | {
                "max_position_embeddings": 16,
                "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
            }
        )
    )
    initialize(made, 0, deviation=0.3)
    row = list(PROMPTS[0])
    read = nnx.jit(
        lambda model, row: model.logits(
            model(row, positions=jnp.arange(row.shape[1])[None], rope_length=42)
        )
    )
    for token in written(made, PROMPTS[:1], tokens=5)[0]:
        logits = read(made, jnp.asarray([row + [0] * (48 - len(row))]))[0, len(row) - 1]
        assert int(jnp.argmax(logits)) == token
        row.append(token)


@pytest.mark.parametrize(
    "model,settings",
    [
        (build, {"sampling": Sampling(temperature=1.0, top_k=20, repetition=1.2)}),
        pytest.param(local, {}, marks=pytest.mark.slow),
    ],
)
def test_a_completion_does_not_depend_on_the_prompts_beside_it(model, settings):
    beside = written(model(), PROMPTS[:3], tokens=6, rows=3, **settings)
    assert beside == written(model(), PROMPTS[:3], tokens=6, rows=1, **settings)


def test_what_prompts_begin_with_is_read_once(monkeypatch):
    begin = RNG.integers(0, 61, 40)
    prompts = [np.concatenate([begin, rest]) for rest in PROMPTS]
    read, shapes = module.read_chunk, []
    monkeypatch.setattr(
        module,
        "read_chunk",
        lambda *args, **kwargs: shapes.append(args[2].shape) or read(*args, **kwargs),
    )
    together = written(build(), prompts, tokens=4, rows=4)
    assert shapes[:2] == [(1, 16)] * 2 and all(shape[0] == 4 for shape in shapes[2:])
    assert together == written(build(), prompts, tokens=4, rows=1)
    assert (
        written(build(), [begin[:33]] * 2, tokens=4) == written(build(), [begin[:33]], tokens=4) * 2
    )


def test_questions_about_one_document_stand_together_and_others_side_by_side(monkeypatch):
    a, b, c = (list(RNG.integers(0, 61, 40)) for _ in range(3))
    others = [list(RNG.integers(0, 61, n)) for n in (9, 33, 50)]
    prompts = [
        np.asarray(p)
        for p in (
            others[0],
            others[1],
            a + [1, 2],
            a + [3],
            a + [4],
            a + [5],
            b + [6],
            b,
            others[2],
            c,
        )
    ]
    read, rows = module.read_chunk, []
    monkeypatch.setattr(
        module,
        "read_chunk",
        lambda *args, **kwargs: rows.append(args[2].shape[0]) or read(*args, **kwargs),
    )
    together = written(build(), prompts, tokens=1, rows=3)
    # Two others; of a document 32 tokens once, and each question; what is over of it; the other
    # two.
    assert rows == [2, 2, 2, *[1, 1, 3], 1, 1, 1, *[1, 1, 2], 2, 2, 2, 2]
    assert together == written(build(), prompts, tokens=1, rows=1)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(local, marks=pytest.mark.slow),
        lambda: build(model_type="mistral", sliding_window=24),
    ],
    ids=["chunked", "window"],
)
def test_a_window_counts_tokens_and_not_the_padding_behind_a_shared_beginning(model):
    begin = RNG.integers(0, 61, 32)
    prompts = [np.concatenate([begin, rest]) for rest in PROMPTS]
    assert written(model(), prompts, tokens=6, rows=4) == written(
        model(), prompts, tokens=6, rows=1
    )


def test_a_cache_in_eight_bits_is_close():
    exact, rounded = (
        np.stack(list(stream(build(), PROMPTS, tokens=8, cache_dtype=dtype)))
        for dtype in (None, jnp.int8)
    )
    assert (exact == rounded).mean() > 0.7


def test_a_chunk_is_written_into_the_cache_in_place():
    model = Decoder(spec_from_hf(HF | {"num_hidden_layers": 8}))
    cache, chunk = (
        jax.eval_shape(lambda: empty_cache(model.spec, 1, 8192)),
        jax.ShapeDtypeStruct((1, 16), jnp.int32),
    )
    program = module.read_chunk.lower(
        *nnx.split(model),
        chunk,
        chunk,
        chunk,
        cache,
        rope_length=8192,
        dtype=jnp.float32,
        layout=None,
    ).compile()
    memory, held = (
        program.memory_analysis(),
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.states)),
    )
    # a layer's, not all once more
    assert memory.alias_size_in_bytes >= held and memory.temp_size_in_bytes < held / 2


def test_over_a_mesh_as_on_one_device():
    mesh = make_mesh(fsdp=2, data=2, tensor=2)
    model = nnx.clone(build())
    move(model, mesh)
    assert written(model, PROMPTS[:3], tokens=6, layout=Layout(mesh)) == written(
        build(), PROMPTS[:3], tokens=6
    )


def test_ends_at_a_stop_token_or_string(tokenizer):
    model = build(vocab_size=300)
    whole = generate(model, PROMPTS[:2], tokens=8, tokenizer=tokenizer)
    assert not whole[0].ended and whole[0].text == tokenizer.decode(whole[0].tokens)
    token = whole[0].tokens[3]
    at = whole[0].tokens.index(token)
    cut = generate(model, PROMPTS[:2], tokens=8, stop=frozenset({token}))
    assert cut[0].ended and cut[0].tokens == whole[0].tokens[:at] and cut[0].text is None
    string = whole[0].text[3:5]
    cut = generate(
        model, PROMPTS[:2], tokens=8, stop_strings=("not there", string), tokenizer=tokenizer
    )
    assert cut[0].ended and cut[0].text == whole[0].text[: whole[0].text.index(string)]
