"""What is learned: everything of a text, the completion, what the assistant says."""

import numpy as np
import pytest
from corpus import prose

from unisono.data.documents import Chat, Completion, Text
from unisono.data.encode import ENDS, LEARNED, encode, make_encoder
from unisono.data.problems import Problems
from unisono.errors import ConfigError

# The same ChatML without markers, as SmolLM2 has it.
UNMARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TALK = Chat(
    "t",
    1,
    0,
    (
        ("system", "be kind"),
        ("user", "the fox?"),
        ("assistant", "a lazy dog"),
        ("user", "and"),
        ("assistant", "jumps"),
    ),
)


@pytest.fixture
def fresh(tokenizer, tmp_path):
    """A copy whose chat template may be changed."""
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


def learned_text(tokenizer, documents, problems=None):
    """The learned stretches, decoded; and the whole."""
    ids, flags = encode(documents, make_encoder(tokenizer), problems or Problems())
    stretches, current = [], []
    for i, flag in zip(ids.tolist(), flags.tolist()):
        if flag & LEARNED:
            current.append(i)
        elif current:
            stretches.append(tokenizer.decode(current))
            current = []
    if current:
        stretches.append(tokenizer.decode(current))
    return stretches, tokenizer.decode(ids.tolist()), ids, flags


def test_text_is_learned_whole_and_ends_with_the_end_token(tokenizer):
    stretches, whole, ids, flags = learned_text(
        tokenizer, [Text("x", 1, 0, "the fox"), Text("x", 2, 0, "a dog")]
    )
    assert whole == "the fox<|endoftext|>a dog<|endoftext|>" and stretches == [whole]
    assert np.flatnonzero(flags & ENDS).tolist() == np.flatnonzero(ids == 0).tolist()


def test_segments_of_a_text_make_one_document_with_the_tokens_of_the_whole(
    tokenizer, tmp_path, monkeypatch
):
    from corpus import read_all

    from unisono.data import documents

    monkeypatch.setattr(documents, "SEGMENT_CHARS", 300)
    text = prose(3000, seed=9)
    (tmp_path / "x.txt").write_text(text)
    segments, _ = read_all(tmp_path / "x.txt")
    assert len(segments) > 20
    ids, flags = encode(segments, make_encoder(tokenizer), Problems())
    assert ids.tolist() == [*tokenizer(text, add_special_tokens=False)["input_ids"], 0]
    assert np.flatnonzero(flags & ENDS).tolist() == [len(ids) - 1]


def test_only_the_completion_is_learned(tokenizer):
    stretches, whole, ids, flags = learned_text(
        tokenizer, [Completion("x", 1, 0, "the fox ", "jumps over")]
    )
    assert whole == "the fox jumps over<|endoftext|>" and stretches == ["jumps over<|endoftext|>"]
    prompt = tokenizer("the fox ", add_special_tokens=False)["input_ids"]
    assert ids[: len(prompt)].tolist() == prompt  # as at generation
    assert flags[-1] == LEARNED | ENDS


@pytest.mark.parametrize("marked", [True, False])
def test_of_messages_the_completion_alone_is_learned(fresh, marked):
    if not marked:
        fresh.chat_template = UNMARKED
    turns = [{"role": role, "content": content} for role, content in TALK.messages]
    stretches, whole, ids, flags = learned_text(
        fresh, [Completion("x", 1, 0, turns[:4], turns[4:])]
    )
    assert whole == fresh.apply_chat_template(turns, tokenize=False)
    before = fresh.apply_chat_template(turns[:4], tokenize=False, add_generation_prompt=True)
    assert stretches == [whole.removeprefix(before)] and stretches[0].startswith("jumps<|im_end|>")
    assert np.flatnonzero(flags & ENDS).tolist() == [len(ids) - 1]


def test_marked_template(tokenizer):
    stretches, _, ids, flags = learned_text(tokenizer, [TALK, TALK])
    assert stretches == ["a lazy dog<|im_end|>", "jumps<|im_end|>"] * 2
    expected = tokenizer.apply_chat_template(
        [{"role": r, "content": c} for r, c in TALK.messages], tokenize=True
    )["input_ids"]
    assert ids.tolist() == [*expected, *expected]
    assert np.flatnonzero(flags & ENDS).tolist() == [len(expected) - 1, 2 * len(expected) - 1]


def test_marked_template_agrees_with_transformers_own_mask(tokenizer):
    # With the last reply at the end: transformers' mask runs on to the end of the conversation when
    # a block ends in white space, so only a template whose blocks do not is comparable.
    out = tokenizer.apply_chat_template(
        [{"role": r, "content": c} for r, c in TALK.messages],
        tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
    )  # fmt: skip
    _, flags = encode([TALK], make_encoder(tokenizer), Problems())
    assert (flags & LEARNED).tolist() == out["assistant_masks"]


def test_unmarked_template_is_rendered_message_by_message(fresh):
    fresh.chat_template = UNMARKED
    encoder = make_encoder(fresh)
    assert not encoder.marks
    stretches, whole, _, _ = learned_text(fresh, [TALK])
    assert stretches == ["a lazy dog<|im_end|>\n", "jumps<|im_end|>\n"]
    assert whole.startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nthe fox?")


@pytest.mark.parametrize("content", [" two spaces", "\n\nlines", "\u00e9", "<|im_end|>"])
def test_odd_replies_are_learned_whole(fresh, content):
    chat = Chat("x", 1, 0, (("user", "hi"), ("assistant", content)))
    for template in (fresh.chat_template, UNMARKED):
        fresh.chat_template = template
        stretches, _, _, _ = learned_text(fresh, [chat])
        assert stretches[0].startswith(content)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        # As Qwen3: what was said before is rendered anew.
        (
            "{% for m in messages %}{{ loop.revindex ~ m['role'] + m['content'] }}{% endfor %}",
            "renders messages[:3] anew",
        ),
        ("{{ raise_exception('roles must alternate') }}", "refuses it: roles must alternate"),
        (
            "{% for m in messages %}{% generation %}{{ m['role'] }}{% endgeneration %}{% endfor %}",
            "do not hold",
        ),
        ("{{ 1 / 0 }}", "refuses it: division by zero"),
    ],
)
def test_a_chat_that_cannot_be_masked_is_reported(fresh, template, reason):
    fresh.chat_template = template
    problems = Problems()
    ids, _ = encode([TALK, Text("x", 2, 0, "kept")], make_encoder(fresh), problems)
    assert fresh.decode(ids) == "kept<|endoftext|>"
    problem = problems.by_kind["chat template"]
    assert (problem.file, problem.line) == ("t", 1) and reason in problem.reason


def test_chats_need_a_template(fresh):
    fresh.chat_template = None
    with pytest.raises(ConfigError, match=r"no chat template, but t:1 holds messages"):
        encode([TALK], make_encoder(fresh), Problems())


def test_an_end_token_is_needed(fresh):
    fresh.eos_token = None
    with pytest.raises(ConfigError, match="no eos token"):
        make_encoder(fresh)


def test_a_begin_token_that_the_tokenizer_adds_begins_each_document(fresh):
    from tokenizers.processors import TemplateProcessing

    fresh.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    documents = [
        Text("x", 1, 0, "the", last=False),
        Text("x", 1, 0, "fox", first=False),
        Completion("x", 2, 0, "a", "dog"),
    ]
    _, whole, _, flags = learned_text(fresh, documents)
    assert whole == "<|im_start|>thefox<|endoftext|><|im_start|>adog<|endoftext|>"
    assert not flags[-6] & LEARNED


def test_truncation_and_padding_left_set_do_nothing(fresh):
    encoder = make_encoder(fresh)
    fresh.backend_tokenizer.enable_truncation(3)
    fresh.backend_tokenizer.enable_padding(length=50)
    ids, _ = encode([Text("x", 1, 0, "the quick brown fox jumps")], encoder, Problems())
    assert fresh.decode(ids) == "the quick brown fox jumps<|endoftext|>"


@pytest.fixture(scope="module")
def metaspace():
    """As Llama 2: SentencePiece's space before each text, so pieces apart are not the whole."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>", "[/INST]"], show_progress=False
    )
    backend.train_from_iterator([prose(2000), "[INST]"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>",
        chat_template="{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] + '[/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}",
    )  # fmt: skip


def test_a_tokenizer_that_puts_a_space_first_uses_prefixes(metaspace):
    encoder = make_encoder(metaspace)
    assert not encoder.splits
    problems = Problems()
    chat = Chat("x", 1, 0, (("user", "the fox"), ("assistant", "jumps over")))
    ids, flags = encode([chat], encoder, problems)
    whole = metaspace("the fox[/INST] jumps over</s>", add_special_tokens=False)["input_ids"]
    assert ids.tolist() == whole and not problems.total
    learned = ids[(flags & LEARNED) != 0].tolist()
    assert learned == whole[whole.index(2) + 1 :]


def test_prefixes_that_do_not_hold_are_reported(metaspace):
    problems = Problems()
    # "wiz" alone and "wiz" + "ards" have other tokens.
    ids, _ = encode(
        [Completion("x", 4, 0, "seven wiz", "ards box")], make_encoder(metaspace), problems
    )
    assert len(ids) == 0
    assert problems.by_kind["chat template"].line == 4
