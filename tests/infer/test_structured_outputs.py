"""Texts that must have a form, from a random model: it writes noise, so that the form comes from the masks alone."""

import importlib.util
import json
import re
import sys
import threading

import numpy as np
import pytest

from pyengine import LLM, SamplingParams
from pyengine.errors import ArgumentError, BackendUnavailable
from pyengine.infer import StructuredOutputError, StructuredOutputs
from pyengine.infer.grammar import MAX_CACHED_GRAMMARS, GrammarCompiler, GrammarLimits
from pyengine.tokenizer.stream import token_bytes

needs_library = pytest.mark.skipif(importlib.util.find_spec("llguidance") is None, reason="needs llguidance")
PROMPT = [5, 9, 200]
EOS = 2


@pytest.fixture(scope="module")
def llm(tiny):
    return LLM(tiny, cache_tokens=8192)


def params(max_tokens=200, seed=0, **form):
    options = {name: form.pop(name) for name in list(form) if name in SamplingParams.__dataclass_fields__}
    options = {"temperature": 1.0, "seed": seed, "max_tokens": max_tokens} | options
    return SamplingParams(structured_outputs=StructuredOutputs(**form), **options)


def texts(llm, n=8, **form):
    """Texts that ended by themselves."""
    completions = [c for seed in range(3) for c in llm.generate([PROMPT], params(n=n, seed=seed, **form))]
    return [c.text for c in completions if c.finish_reason == "stop"]


# --- what comes out ---------------------------------------------------------------------------------------------------

SCHEMAS = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 8},
            "age": {"type": "integer", "minimum": 3, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["x", "yy", 3, None]}, "minItems": 1, "maxItems": 3},
            "ok": {"type": "boolean"},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    {"type": "array", "prefixItems": [{"const": "é"}, {"type": "null"}], "items": False, "minItems": 2},
    {"anyOf": [{"type": "integer", "minimum": 10, "maximum": 12}, {"type": "string", "pattern": "^[a-c]{2,4}$"}]},
    {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"v": {"enum": [1, 2]}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    {"type": "string", "format": "date"},
]


@needs_library
@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_json_satisfies_its_schema(llm, schema):
    jsonschema = pytest.importorskip("jsonschema")
    for form in (schema, json.dumps(schema)):
        found = texts(llm, json=form, disable_any_whitespace=True)
        assert len(found) >= 6
        for text in found:
            jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
            assert "\n" not in text
    # An order of spaces and line breaks is free unless it is turned off.
    for text in texts(llm, json=schema):
        jsonschema.validate(json.loads(text), schema)


@needs_library
def test_json_object(llm):
    found = texts(llm, n=24, json_object=True, disable_any_whitespace=True, logit_bias={95: 20.0, EOS: 20.0})
    assert found
    assert all(isinstance(json.loads(text), dict) for text in found)


@needs_library
@pytest.mark.parametrize(
    "regex",
    [r"(yes|no)+[0-9]{2}", r"[a-f]{3}/[0-9]\/x", r"a\\b\.c|[/]", "(é|😀|z){1,5}", r"(ab?c){2,5}!", "a\nb|c\td"],
)
def test_regex_matches_the_whole_text(llm, regex):
    found = texts(llm, regex=regex)
    assert len(found) >= 12
    for text in found:
        assert re.fullmatch(regex, text), text


CHOICES = ("red", "reddish", "green é", "😀", 'a"b\\c\n\x01', " space", "<|im_en", "/x/")


@needs_library
def test_choice_is_one_of_them(llm):
    biases = dict.fromkeys(range(384), -2.0)
    found = set(texts(llm, n=60, choice=CHOICES, logit_bias=biases, temperature=3.0))
    assert found <= set(CHOICES)
    assert len(found) >= 5
    for choice in CHOICES:
        assert set(texts(llm, n=1, choice=(choice,))) == {choice}


@needs_library
def test_lark_grammar_nests(llm):
    grammar = 'start: list\nlist: "[" (item ("," item)*)? "]"\nitem: list | /[0-9]/\n'
    found = texts(llm, grammar=grammar, temperature=2.0)
    assert len(found) >= 12
    assert any("[" in text[1:] for text in found)
    for text in found:
        assert isinstance(json.loads(text), list)
        assert set(text) <= set("[],0123456789")


@needs_library
def test_a_cut_text_is_a_beginning(llm):
    completion = llm.generate([PROMPT], params(regex="[ab]{50}", max_tokens=7))[0]
    assert completion.finish_reason == "length"
    assert re.fullmatch("[ab]{7,49}", completion.text)


# --- the masks --------------------------------------------------------------------------------------------------------


@needs_library
def test_masks_are_those_of_brute_force(llm):
    """A token may come when what it makes is the beginning of a choice; the end token when it is a choice.

    Bytes that must come may be written with the tokens of their own encoding alone.
    """
    choices = [choice.encode() for choice in CHOICES]
    spelled = [token_bytes(llm.tokenizer.id_to_token(token)) for token in range(384)]
    rng = np.random.default_rng(0)
    num_states = num_free = 0
    for _ in range(40):
        grammar = llm._grammars.compile(StructuredOutputs(choice=CHOICES))
        prefix, has_stopped = b"", False
        while not has_stopped:
            bits = np.unpackbits(grammar.mask().view(np.uint8), bitorder="little")
            allowed = set(np.flatnonzero(bits).tolist())
            expected = {
                token
                for token, text in enumerate(spelled)
                if token not in llm.tokenizer.special_ids and any(c.startswith(prefix + text) for c in choices)
            }
            expected |= {EOS} if prefix in choices else set()
            next_bytes = {c[len(prefix) : len(prefix) + 1] for c in choices if c.startswith(prefix)}
            assert allowed <= expected
            assert allowed == expected or len(next_bytes) == 1
            num_free += len(next_bytes) > 1
            token = int(rng.choice(sorted(allowed)))
            if token == EOS:
                break
            has_stopped = grammar.accept(token)
            prefix += spelled[token]
            num_states += 1
            assert has_stopped == (prefix in choices and prefix != b"red")
    assert num_states > 100
    assert num_free > 40


@needs_library
def test_special_tokens_do_not_pass_for_text(llm):
    with pytest.raises(ArgumentError, match="expected a token that may be drawn"):
        llm.generate([PROMPT], params(choice=("<|im_end|>",)))
    for seed in range(5):
        completion = llm.generate([PROMPT], params(seed=seed, regex="<.im_start[|]>"))[0]
        assert re.fullmatch("<.im_start[|]>", completion.text)
        assert not llm.tokenizer.special_ids & set(completion.token_ids)
    named = llm.generate([PROMPT], params(grammar='start: "a" <|im_start|> "b"', skip_special_tokens=False))[0]
    assert named.text == "a<|im_start|>b"


@needs_library
def test_tokens_past_the_vocabulary_of_the_tokenizer_are_never_drawn(tmp_path, spec):
    from pyengine.testing.random_model import make_spec, write_model

    wide = LLM(write_model(tmp_path / "wide", make_spec(vocab_size=431), num_tokens=384))
    biases = dict.fromkeys(range(384, 431), 50.0)
    completion = wide.generate([PROMPT], params(regex="[a-z ]{30}", logit_bias=biases))[0]
    assert re.fullmatch("[a-z ]{30}", completion.text)


# --- alone, together, streamed ----------------------------------------------------------------------------------------

FORMS = [
    {"regex": "[a-z]{20}[0-9]"},
    {"choice": CHOICES},
    {"json": SCHEMAS[0], "repetition_penalty": 1.2},
    {"grammar": 'start: /[a-z]+/ "." start?', "allowed_token_ids": tuple(range(3, 120)), "max_tokens": 30},
]


@needs_library
def test_same_text_alone_in_a_batch_and_after_preemption(tiny, llm):
    options = [params(seed=i, **form) for i, form in enumerate(3 * FORMS)]
    options += [SamplingParams(max_tokens=40, temperature=1.0, seed=i, ignore_eos=True) for i in range(4)]
    prompts = [[i + 3, 50 + i] for i in range(len(options))]
    together = llm.generate(prompts, options)
    assert together == [llm.generate([p], o)[0] for p, o in zip(prompts, options, strict=True)]
    assert together == LLM(tiny, cache_tokens=224, page_size=16).generate(prompts, options)
    for prompt, option, completion in zip(prompts[:6], options, together, strict=False):
        pieces = list(llm.stream(prompt, option))
        assert pieces[-1].completion == completion
        assert "".join(piece.text for piece in pieces) == completion.text


@needs_library
def test_greedy_takes_the_likeliest_allowed_token(llm):
    completion = llm.generate([PROMPT], params(regex="[0-9]{12}", temperature=0.0))[0]
    ids = list(PROMPT)
    digits = [token for token in range(384) if (llm.tokenizer.id_to_token(token) or "").isdigit()]
    digits = [token for token in digits if llm.tokenizer.decode([token]).isascii()]
    for token in completion.token_ids:
        logits = llm.logits(ids)[-1]
        assert token == max(digits, key=lambda t: logits[t])
        ids.append(token)
    assert len(completion.text) == 12


# --- what goes wrong --------------------------------------------------------------------------------------------------

CHAIN = "start: r0\n" + "".join(f'r{i}: r{i + 1} r{i + 1} | "x"\n' for i in range(8000)) + 'r8000: "y"\n'


@needs_library
@pytest.mark.parametrize(
    ("form", "reason", "message"),
    [
        ({"regex": "(?=a)b"}, "syntax", "look-ahead"),
        ({"regex": "("}, "syntax", "unclosed group"),
        ({"grammar": "start: absent"}, "syntax", 'unknown name: "absent"'),
        ({"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, "syntax", "nested"),
        ({"json": {"type": "frob"}}, "syntax", "Invalid type: frob"),
        ({"json": {"not": {"type": "string"}}}, "syntax", r"Unimplemented keys: \[\"not\"\]"),
        ({"json": {"not": {}, "x-guidance": {"lenient": True}}}, "syntax", "Unimplemented keys"),
        ({"json": {"$ref": "https://example.com/schema"}}, "syntax", "example.com"),
        ({"json": '{"items":' * 500 + "{}" + "}" * 500}, "syntax", "recursion limit"),
        ({"grammar": CHAIN}, "crash", "the process ended with status -11"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_grammar_is_a_typed_error_and_the_next_one_works(llm, form, reason, message):
    with pytest.raises(StructuredOutputError, match=message) as caught:
        texts(llm, n=1, **form)
    assert caught.value.reason == reason
    assert texts(llm, n=1, choice=("fine",)) == ["fine"] * 3


@needs_library
def test_processor_time_and_memory_are_limited(llm):
    patterns = {f"^{a}{b}.*": {"type": "integer"} for a in "abcdefghijklmnopqrst" for b in "abcdefghijklmnopqrst"}
    slow = StructuredOutputs(json={"type": "object", "patternProperties": patterns})
    large = StructuredOutputs(json={"type": "integer", "multipleOf": 987654})
    for limits, outputs, reason in [
        (GrammarLimits(cpu_seconds=0), slow, "time"),
        (GrammarLimits(wall_seconds=0.2), slow, "time"),
        (GrammarLimits(memory_bytes=60 << 20), large, "memory"),
    ]:
        compiler = GrammarCompiler(llm.tokenizer, 384, (EOS,), limits)
        with pytest.raises(StructuredOutputError) as caught:
            compiler.compile(outputs)
        assert caught.value.reason == reason
        assert compiler.compile(StructuredOutputs(choice=("fine",))).error() is None
        compiler.close()


@needs_library
def test_a_grammar_that_explodes_while_it_runs_ends_alone(llm):
    other = llm.stream(PROMPT, SamplingParams(max_tokens=30, temperature=1.0, ignore_eos=True))
    pieces = [next(other)]
    schema = {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(700)}}
    with pytest.raises(StructuredOutputError, match=r"Current row has .* items") as caught:
        llm.generate([PROMPT], params(json=schema, disable_any_whitespace=True))
    assert caught.value.reason == "complexity"
    pieces += list(other)
    assert len(pieces[-1].completion.token_ids) == 30
    assert llm._runner.decoder.num_free_pages == llm._runner.decoder.num_pages


@needs_library
def test_no_allowed_token_is_a_typed_error(llm):
    with pytest.raises(ArgumentError, match="expected a token that may be drawn, got none: structured_outputs"):
        llm.generate([PROMPT], params(choice=("a",), allowed_token_ids=(300,)))
    assert texts(llm, n=1, choice=("fine",)) == ["fine"] * 3


def test_without_the_library_the_error_says_what_to_install(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'pyengine\[structured\]'"):
        LLM(tiny).generate([PROMPT], params(choice=("a",)))


@needs_library
def test_a_model_without_an_end_token_is_refused(llm):
    with pytest.raises(ArgumentError, match="expected a model with an end token"):
        GrammarCompiler(llm.tokenizer, 384, ()).compile(StructuredOutputs(choice=("a",)))


@needs_library
def test_a_known_grammar_waits_for_no_compilation(llm):
    known, unknown = StructuredOutputs(choice=("a", "b")), StructuredOutputs(choice=("c",))
    llm._grammars.compile(known)
    done = []
    with llm._grammars._compile_lock:
        threads = [
            threading.Thread(target=lambda form=form: done.append((form, llm._grammars.compile(form))))
            for form in (unknown, known)
        ]
        for thread in threads:
            thread.start()
        threads[1].join(timeout=60)
        assert [form for form, _ in done] == [known]
    threads[0].join(timeout=60)
    assert [form for form, _ in done] == [known, unknown]


@needs_library
def test_the_grammars_that_are_kept_are_few(llm):
    compiler = GrammarCompiler(llm.tokenizer, 384, (EOS,))
    forms = [StructuredOutputs(choice=(f"text {i}",)) for i in range(MAX_CACHED_GRAMMARS + 3)]
    for form in forms:
        compiler.compile(form)
        compiler.compile(forms[0])
    assert list(compiler._compiled) == [*forms[4:], forms[0]]
    compiler.close()


@needs_library
def test_the_process_ends_with_its_compiler(llm):
    compiler = GrammarCompiler(llm.tokenizer, 384, (EOS,))
    compiler.compile(StructuredOutputs(choice=("a",)))
    child = compiler._worker._child
    assert child.poll() is None
    del compiler
    assert child.poll() is not None


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({}, "expected one of json, json_object, regex, choice, grammar, got none"),
        ({"regex": "a", "choice": ("a",)}, "got regex and choice"),
        ({"json_object": True, "json": {}}, "got json and json_object"),
        ({"regex": 7}, "regex: expected a str, got int"),
        ({"regex": "a" * (256 * 1024 + 1)}, "expected at most 262144 bytes, got 262145"),
        ({"regex": "é" * (128 * 1024 + 1)}, "expected at most 262144 bytes, got 262146"),
        ({"choice": ("x" * 100_000,) * 3}, "expected at most 262144 bytes, got 300000"),
        ({"grammar": "\ud800"}, "expected Unicode, got a lone surrogate at 0"),
        ({"choice": ()}, "choice: expected 1 to 1024 texts, got 0"),
        ({"choice": ("a",) * 1025}, "choice: expected 1 to 1024 texts, got 1025"),
        ({"choice": "ab"}, "choice: expected several texts, got a str"),
        ({"choice": ("a", "")}, "choice: expected texts of at least 1 character, got ''"),
        ({"json": "{"}, "json: expected a JSON schema, got: Expecting property name"),
        ({"json": "[1]"}, "json: expected an object, got list"),
        ({"json": {"const": {1, 2}}}, "json: expected plain JSON values"),
        ({"json": '{"items":' * 100_000}, "expected at most 262144 bytes"),
        ({"json": "[" * 200_000}, "json: expected a JSON schema, got"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_forms_are_named(form, message):
    with pytest.raises(ArgumentError, match=f"^structured_outputs.*{re.escape(message)}"):
        StructuredOutputs(**form)


def test_a_form_must_be_able_to_end():
    with pytest.raises(ArgumentError, match=r"^ignore_eos: expected False with structured_outputs, got True"):
        params(choice=("a",), ignore_eos=True)
    with pytest.raises(ArgumentError, match=r"^structured_outputs: expected StructuredOutputs, got"):
        SamplingParams(structured_outputs={"choice": ["a"]})
