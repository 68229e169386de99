from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from groupsae.errors import InputError
from groupsae.evaluation import tasks
from groupsae.evaluation.tasks import BUILT_IN, Pairs, Task, open_task
from groupsae.host import bundled
from groupsae.host.bundled import tasks as bundled_tasks
from groupsae.host.model import HostModel
from tests.host.tiny_models import tiny_model, tiny_tokenizer

KEYS = ("clean_prefix", "patch_prefix", "clean_answer", "patch_answer")


def host_with(tokenizer: Any, name: str = "host", context: int = 64) -> HostModel:
    """A model that is as small as can be and embeds all tokens of a tokenizer."""
    config = transformers.GPTNeoXConfig(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=context,
    )
    return HostModel(transformers.AutoModelForCausalLM.from_config(config), tokenizer, name=name)


def loaded(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def pythia(shared: Path) -> HostModel:
    """With the GPT-NeoX tokenizer, which begins a word with its space and adds no BOS."""
    return host_with(loaded(shared / "models" / "pythia-tokenizer"), context=128)


@pytest.fixture(scope="module")
def stories(shared: Path) -> HostModel:
    """With a SentencePiece tokenizer, which begins every text with a space and with BOS."""
    return host_with(loaded(shared / "models" / "stories3M"))


@pytest.fixture(scope="module")
def english() -> HostModel:
    """With the bundled tokenizer, but not the bundled model: the built-in words are ours."""
    return host_with(loaded(bundled.MODEL))


@pytest.fixture(scope="module")
def small() -> HostModel:
    """With the words w2 to w95; every other one is the unknown token."""
    tokenizer = tiny_tokenizer()
    tokenizer.unk_token = "<|padding|>"
    return HostModel(tiny_model("gpt_neox"), tokenizer, name="small")


def example(
    clean: str = "w2 w3", patch: str = "w2 w4", a_clean: str = " w5", a_patch: str = " w6"
) -> dict[str, str]:
    return dict(zip(KEYS, (clean, patch, a_clean, a_patch), strict=True))


def different(n: int, length: int = 3) -> list[dict[str, str]]:
    """Usable examples of `length` tokens for the small host."""
    rest = " w9" * (length - 2)
    return [
        example(f"w{2 + i % 90} w3{rest}", f"w{2 + i % 90} w{i // 90 + 4}{rest}") for i in range(n)
    ]


def write(folder: Path, lines: list[Any], name: str = "task") -> str:
    path = folder / "task.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return f"{name}={path}"


def texts(task: Task, host: HostModel) -> list[tuple[str, str]]:
    """Clean prompt and answer of every example, as the tokenizer reads them back."""
    decode = host.tokenizer.decode
    return [
        (decode(ids, skip_special_tokens=True), decode([answer]).strip())
        for pairs in task.lengths
        for ids, answer in zip(pairs.clean.tolist(), pairs.a_clean.tolist(), strict=True)
    ]


def lengths(task: Task) -> dict[int, int]:
    return {pairs.clean.shape[1]: len(pairs) for pairs in task.lengths}


# --- the published files -------------------------------------------------------------------------


@pytest.mark.shared
@pytest.mark.parametrize(
    ("file", "length", "kept", "dropped"),
    [
        ("ioi", 15, 7882, {"an example that is there twice": 310}),
        (
            "greater_than",
            12,
            8571,
            {"an example that is there twice": 584, "the prompts are the same": 18},
        ),
    ],
)
def test_published_prompts_have_their_published_lengths(
    shared: Path, pythia: HostModel, file: str, length: int, kept: int, dropped: dict[str, int]
) -> None:
    path = shared / "tasks" / "group-sae" / f"{file}.jsonl"
    task = open_task(f"{file}={path}", pythia, examples=10_000, seed=0)
    assert (task.name, task.source) == (file, str(path))
    assert lengths(task) == {length: kept}
    assert task.dropped == dropped
    assert len(task) + sum(task.dropped.values()) == len(path.read_text().splitlines())


@pytest.mark.shared
@pytest.mark.parametrize("host_name", ["pythia", "stories", "english"])
@pytest.mark.parametrize("file", ["nounpp_test", "simple_train", "within_rc_test"])
def test_agreement_prompts_are_kept_where_the_tokenizer_allows(
    shared: Path, request: pytest.FixtureRequest, host_name: str, file: str
) -> None:
    host = request.getfixturevalue(host_name)
    path = shared / "tasks" / "subject-verb-agreement" / f"{file}.json"
    usable: Counter[int] = Counter()
    seen = set()
    for line in path.read_text().splitlines():
        record = json.loads(line)
        clean, patch, *answers = (record[key] for key in KEYS)
        if (clean, patch, *answers) in seen:
            continue
        seen.add((clean, patch, *answers))
        length = len(host.tokenizer(clean)["input_ids"])
        alone = [host.tokenizer(a, add_special_tokens=False)["input_ids"] for a in answers]
        if len(host.tokenizer(patch)["input_ids"]) == length and [*map(len, alone)] == [1, 1]:
            usable[length] += 1
    expected = {length: n for length, n in sorted(usable.items()) if n >= 16}

    if sum(expected.values()) < 64:
        with pytest.raises(InputError, match="at least 64 are needed"):
            open_task(f"{file}={path}", host, examples=10_000, seed=0)
    else:
        task = open_task(f"{file}={path}", host, examples=10_000, seed=0)
        assert lengths(task) == expected
        assert set(task.lengths[0].cases) <= {
            *("plural", "singular"),
            *("plural_plural", "plural_singular", "singular_plural", "singular_singular"),
        }


@pytest.mark.shared
def test_two_digits_are_no_token_for_a_tokenizer_of_single_digits(
    shared: Path, stories: HostModel, tmp_path: Path
) -> None:
    lines = (shared / "tasks" / "group-sae" / "greater_than.jsonl").read_text().splitlines()[:500]
    path = tmp_path / "years.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(InputError) as caught:
        open_task(f"years={path}", stories, examples=1000, seed=0)
    assert "of the 500 examples of years" in str(caught.value)
    assert "none is usable" in str(caught.value)
    assert "an answer of more than one token (" in str(caught.value)
    with pytest.raises(InputError, match="needs at least 64 years"):
        open_task("greater_than", stories, examples=1000, seed=0)


# --- how prompts and answers are read ------------------------------------------------------------


@pytest.mark.shared
@pytest.mark.parametrize(
    ("host_name", "prompt", "answer", "token"),
    [
        ("pythia", "The dog", " has", " has"),
        ("pythia", "The dog ", "has", "has"),  # joined to the space: " has" is one token
        ("pythia", "From the year 1950 to the year 19", "99", "99"),  # joined: " 1999"
        ("pythia", "The dog", " floccinaucinihilipilification", None),
        ("stories", "The dog", " has", "▁has"),
        ("stories", "In 19", "9", "9"),
        ("stories", "In 19", "99", None),
        ("stories", "The dog ", "has", "▁has"),  # the tokenizer drops the last space
        ("stories", "The dog", "has", None),  # alone it has a space that is not there
        ("english", "The dog", " has", "Ġhas"),
    ],
)
def test_an_answer_is_the_token_that_reads_as_it_after_its_prompt(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    host_name: str,
    prompt: str,
    answer: str,
    token: str | None,
) -> None:
    host = request.getfixturevalue(host_name)
    openings = [f"{'The cat ' * i}" for i in range(1, 5)]
    names = ["Tom", "Ben", "Sam", "Max", "Tim", "Bob", "Jack", "Sue", "Anna", "Lucy", "Mia", "Lily"]
    name_pairs = [(one, other) for one in names for other in names if one != other]
    lines = [
        example(f"{opening}{one} {prompt}", f"{opening}{other} {prompt}", answer, " the")
        for opening in openings
        for one, other in name_pairs
    ]
    spec = write(tmp_path, lines)
    if token is None:
        with pytest.raises(InputError, match="an answer of more than one token"):
            open_task(spec, host, examples=2000, seed=0)
    else:
        task = open_task(spec, host, examples=2000, seed=0)
        (id_,) = {int(i) for pairs in task.lengths for i in pairs.a_clean}
        assert host.tokenizer.convert_ids_to_tokens(id_).replace("Ġ", " ") == token.replace(
            "Ġ", " "
        )


def test_a_space_that_the_tokenizer_adds_itself_is_not_asked_for_twice(tmp_path: Path) -> None:
    # As Llama's older tokenizers: a text that stands alone gets a space, also before its own one.
    # And a piece may span words, so that a prompt and its answer are joined.
    pieces = {"<unk>": 0.0, "▁": -2.0, "▁dog▁has": -1.0, "▁has": -1.0, "▁is": -1.0, "▁dog": -1.0}
    pieces |= {f"▁n{i}": -1.0 for i in range(70)}
    bare = Tokenizer(models.Unigram([*pieces.items()], unk_id=0))
    bare.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    bare.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>")
    ids = tokenizer("n1 dog has")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁n1", "▁dog▁has"]
    assert len(tokenizer(" has")["input_ids"]) == 2

    lines = [example(f"n{i} dog", f"n{i + 1} dog", " has", " is") for i in range(69)]
    task = open_task(write(tmp_path, lines), host_with(tokenizer), examples=100, seed=0)
    assert len(task) == 69
    answers = tokenizer.convert_tokens_to_ids(["▁has", "▁is"])
    assert set(task.lengths[0].a_clean.tolist()) == {answers[0]}
    assert set(task.lengths[0].a_patch.tolist()) == {answers[1]}


@pytest.mark.shared
@pytest.mark.parametrize("prepend_bos", [None, True, False])
def test_bos_is_there_as_asked_and_by_default_as_the_tokenizer_does(
    request: pytest.FixtureRequest, prepend_bos: bool | None
) -> None:
    for host_name, by_itself in (("pythia", False), ("stories", True), ("english", False)):
        host = request.getfixturevalue(host_name)
        task = open_task("subject_verb", host, examples=200, seed=0, prepend_bos=prepend_bos)
        bos, eos = host.tokenizer.bos_token_id, host.tokenizer.eos_token_id
        for pairs in task.lengths:
            for ids in (pairs.clean, pairs.patch):
                wanted = by_itself if prepend_bos is None else prepend_bos
                assert ids[:, 0].eq(bos).all() == wanted
                assert not ids[:, 1:].eq(bos).any()
                assert not ids[:, 1:].eq(eos).any()


def test_prompts_become_their_tokens(small: HostModel, tmp_path: Path) -> None:
    lines = [example(f"w{i} w3", f"w{i + 1} w3", f" w{i + 2}", f" w{i + 3}") for i in range(2, 90)]
    lines = [line | {"case": f"case {i % 2}"} for i, line in enumerate(lines)]
    task = open_task(write(tmp_path, lines), small, examples=100, seed=5)
    (pairs,) = task.lengths
    first = pairs.clean[:, 0]
    assert sorted(first.tolist()) == list(range(2, 90))
    assert first.tolist() != list(range(2, 90))
    assert torch.equal(pairs.clean, torch.stack([first, torch.full_like(first, 3)], 1))
    assert torch.equal(pairs.patch[:, 0], first + 1)
    assert torch.equal(pairs.a_clean, first + 2)
    assert torch.equal(pairs.a_patch, first + 3)
    assert pairs.cases == tuple(f"case {i % 2}" for i in first.tolist())
    part = pairs.part(10, 13)
    assert len(part) == 3
    assert torch.equal(part.clean, pairs.clean[10:13])
    assert torch.equal(part.a_patch, pairs.a_patch[10:13])
    assert part.cases == pairs.cases[10:13]


def test_both_spellings_of_the_keys_and_blank_lines_are_read(
    small: HostModel, tmp_path: Path
) -> None:
    lines = different(70)
    published = open_task(write(tmp_path, lines), small, examples=70, seed=0)
    short = ("x_clean", "x_patch", "a_clean", "a_patch")
    renamed = [dict(zip(short, line.values(), strict=True)) for line in lines]
    path = tmp_path / "short.json"
    path.write_text("\ufeff" + "\n\n".join(map(json.dumps, renamed)) + "\r\n \n", encoding="utf-8")
    ours = open_task(f"my-task_2={path}", small, examples=70, seed=0)
    assert torch.equal(ours.lengths[0].clean, published.lengths[0].clean)
    assert set(ours.lengths[0].cases) == {"my-task_2"}  # without a case, the task's name


# --- which examples are taken --------------------------------------------------------------------


def test_why_examples_are_left_out_is_counted(small: HostModel, tmp_path: Path) -> None:
    lines = [
        *different(80),
        *[example("w2", f"w3 w{i}") for i in range(2, 9)],
        *[example(f"w{i}", "w2", " w5 w6") for i in range(3, 9)],
        *[example(f"w{i}", "w2", " w5", " w5") for i in range(3, 8)],
        *[example(f"w{i}", f"w{i}") for i in range(3, 7)],
        *[example(f"w{i} what", f"w{i} w9") for i in range(3, 6)],
        *[example(f"w{i} w7", f"w{i} w9", " what") for i in range(3, 12)],
        *different(2),
        example("w3 " * 49, "w4 " * 49),
        *different(15, length=5),
    ]
    task = open_task(write(tmp_path, lines), small, examples=1000, seed=0)
    assert lengths(task) == {3: 80}
    assert list(task.dropped.items()) == [
        ("a length that few examples have", 15),
        ("an unknown token", 12),
        ("prompts of unequal length", 7),
        ("an answer of more than one token", 6),
        ("the answers are the same token", 5),
        ("the prompts are the same", 4),
        ("an example that is there twice", 2),
        ("prompts longer than the host model's context", 1),
    ]


@settings(deadline=None, max_examples=40)
@given(
    counts=st.dictionaries(st.integers(2, 9), st.integers(1, 60), min_size=3, max_size=6),
    wanted=st.integers(64, 200),
    seed=st.integers(0, 9),
)
def test_as_many_examples_are_taken_as_the_frequent_lengths_have(
    small: HostModel, tmp_path_factory: pytest.TempPathFactory, counts, wanted: int, seed: int
) -> None:
    lines = [line for length, n in counts.items() for line in different(n, length)]
    spec = write(tmp_path_factory.mktemp("lengths"), lines)
    by_frequency = sorted(counts.values(), reverse=True)[: wanted // 16]
    usable = [n for n in by_frequency if n >= 16]
    if sum(usable) < 64:
        with pytest.raises(InputError, match="at least 64 are needed"):
            open_task(spec, small, examples=wanted, seed=seed)
        return
    task = open_task(spec, small, examples=wanted, seed=seed)
    taken = lengths(task)
    assert list(taken) == sorted(taken)
    assert sorted((counts[length] for length in taken), reverse=True) == usable
    assert all(16 <= n <= counts[length] for length, n in taken.items())
    assert len(task) == min(wanted, sum(usable))
    rare = sum(counts.values()) - sum(usable)
    assert task.dropped.get("a length that few examples have", 0) == rare


def test_every_length_that_is_kept_has_enough(small: HostModel, tmp_path: Path) -> None:
    lines = [*different(300, length=3), *different(20, length=4), *different(15, length=5)]
    task = open_task(write(tmp_path, lines), small, examples=64, seed=0)
    assert lengths(task) == {3: 48, 4: 16}  # of 64 in a random order, four would have length 4


def test_the_order_is_shuffled_by_the_seed_alone(small: HostModel, tmp_path: Path) -> None:
    spec = write(tmp_path, different(500))
    opened = [open_task(spec, small, examples=100, seed=seed) for seed in (0, 0, 1)]
    same, again, other = (task.lengths[0].patch for task in opened)
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    most = open_task(spec, small, examples=200, seed=0)
    assert torch.equal(most.lengths[0].patch[:100], same)
    assert not opened[0].dropped


# --- halves --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(
    cases=st.lists(
        st.lists(st.sampled_from("abc"), min_size=16, max_size=60), min_size=1, max_size=4
    )
)
def test_halves_are_disjoint_complete_and_alike(cases: list[list[str]]) -> None:
    groups, number = [], 0
    for length, of_length in enumerate(cases, 2):
        ids = torch.arange(number, number + len(of_length))
        number += len(of_length)
        prompts = ids[:, None].expand(-1, length)
        groups.append(Pairs(prompts, prompts + 1, ids + 2, ids + 3, tuple(of_length)))
    task = Task("task", "here", tuple(groups), {"why": 3})
    first, second = task.halves()
    assert (first.name, first.source, first.dropped) == ("task", "here", {"why": 3})
    assert len(first) + len(second) == len(task)
    for whole, *halves in zip(task.lengths, first.lengths, second.lengths, strict=True):
        numbers = [half.clean[:, 0].tolist() for half in halves]
        assert not set(numbers[0]) & set(numbers[1])
        assert sorted(numbers[0] + numbers[1]) == whole.clean[:, 0].tolist()
        assert 0 <= len(halves[0]) - len(halves[1]) <= 1
        counts = [Counter(half.cases) for half in halves]
        assert all(abs(counts[0][case] - counts[1][case]) <= 1 for case in "abc")
        for half in halves:
            case_of = dict(zip(whole.clean[:, 0].tolist(), whole.cases, strict=True))
            assert half.cases == tuple(case_of[i] for i in half.clean[:, 0].tolist())
            assert torch.equal(half.patch, half.clean + 1)
            assert torch.equal(half.a_clean, half.clean[:, 0] + 2)
            assert torch.equal(half.a_patch, half.clean[:, 0] + 3)
    again = task.halves()[0]
    assert all(
        torch.equal(a.clean, b.clean) for a, b in zip(first.lengths, again.lengths, strict=True)
    )


# --- the built-in tasks --------------------------------------------------------------------------


def check_is_sound(task: Task, host: HostModel) -> None:
    """Equal lengths (which the tensors' shapes are), one-token answers, prompts that differ."""
    unknown = host.tokenizer.unk_token_id
    for pairs in task.lengths:
        assert len(pairs) >= 16
        assert pairs.clean.dtype == pairs.a_clean.dtype == torch.int64
        assert (pairs.clean != pairs.patch).any(1).all()
        assert (pairs.a_clean != pairs.a_patch).all()
        if unknown is not None:
            assert not pairs.clean[:, 1:].eq(unknown).any()
            assert not pairs.a_clean.eq(unknown).any()
    for pairs in task.lengths:
        for prompts, answers in ((pairs.clean, pairs.a_clean), (pairs.patch, pairs.a_patch)):
            for ids, answer in list(zip(prompts.tolist(), answers.tolist(), strict=True))[:20]:
                # The answer is what the tokenizer itself puts after this prompt.
                text = host.tokenizer.decode([*ids, answer], skip_special_tokens=True)
                read = host.tokenizer(text)["input_ids"]
                assert read == [*ids, answer]


@pytest.mark.shared
@settings(deadline=None, max_examples=25)
@given(
    host_name=st.sampled_from(["pythia", "stories"]),
    name=st.sampled_from(BUILT_IN),
    seed=st.integers(0, 2**32 - 1),
)
def test_built_in_tasks_are_sound_for_any_tokenizer(
    request: pytest.FixtureRequest, host_name: str, name: str, seed: int
) -> None:
    if (host_name, name) == ("stories", "greater_than"):
        return  # refused: its tokenizer has no years
    host = request.getfixturevalue(host_name)
    task = open_task(name, host, examples=100, seed=seed)
    assert (task.name, task.source, len(task)) == (name, "built in", 100)
    check_is_sound(task, host)


@pytest.mark.shared
def test_generated_prompts_have_the_published_lengths(pythia: HostModel) -> None:
    assert 15 in lengths(open_task("ioi", pythia, examples=1024, seed=0))
    assert lengths(open_task("greater_than", pythia, examples=1024, seed=0)) == {12: 1024}
    across = open_task("subject_verb_across_clause", pythia, examples=1024, seed=0)
    assert lengths(across) == {6: 1024}


@pytest.mark.parametrize("name", [*BUILT_IN[:3], "subject_verb_across_clause"])
def test_the_bundled_model_is_asked_in_its_own_english(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    drawn = set()

    def prompts(task: str, n: int, seed: int) -> list[dict[str, str]]:
        examples = bundled_tasks.prompts(task, n, seed)
        drawn.update((prompt["x_clean"], prompt["a_clean"].strip()) for prompt in examples)
        return examples

    monkeypatch.setattr(tasks, "bundled_prompts", prompts)
    host = host_with(loaded(bundled.MODEL), name="bundled")
    task = open_task(name, host, examples=64, seed=0)
    assert task.source == "bundled"
    assert len(task) == 64
    check_is_sound(task, host)
    assert set(texts(task, host)) <= drawn
    cases = {case for pairs in task.lengths for case in pairs.cases}
    if name == "subject_verb":
        assert len(cases) == 4
    if name == "subject_verb_across_clause":
        assert cases == {"across a relative clause"}


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[1]", "not a JSON object"),
        ('{"clean_prefix": "w2"}', "has none of patch_prefix and x_patch"),
        (json.dumps(example() | {"x_clean": "w2"}), "has both of clean_prefix and x_clean"),
        (json.dumps(example() | {"patch_answer": 3}), "patch_answer is 3"),
        (json.dumps(example() | {"clean_answer": ""}), 'clean_answer is ""'),
        (json.dumps(example() | {"case": None}), "case is null"),
        (json.dumps(example() | {"patch_prefix": "w2 \ud800"}), "patch_prefix is .*no Unicode"),
    ],
)
def test_a_bad_line_is_named(small: HostModel, tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(example()) + "\n\n" + line + "\n")
    with pytest.raises(InputError, match=rf"{path}, line 3.*{said}") as caught:
        open_task(f"own={path}", small, examples=64, seed=0)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("subject-verb", "'subject-verb' is unknown; did you mean subject_verb[^ ]*"),
        ("IOI", "'IOI' is unknown; did you mean ioi"),
        ("x", "'x' is unknown; Built in are ioi, greater_than, subject_verb"),
        ("tasks/ioi.jsonl", "NAME=FILE.jsonl"),
        ("my task=x.jsonl", "'my task' cannot name a task.*letters, digits, - and _"),
        ("../up=x.jsonl", "cannot name a task"),
        ("=x.jsonl", "'' cannot name a task"),
        ("own=/nowhere/x.jsonl", "'/nowhere/x.jsonl' cannot be read: No such file"),
        ("own=", "cannot be read"),
    ],
)
def test_a_bad_name_is_said(small: HostModel, name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        open_task(name, small, examples=64, seed=0)


def test_a_file_that_is_no_text_is_refused(small: HostModel, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"own\.jsonl' cannot be read: it is not UTF-8"):
        open_task(f"own={path}", small, examples=64, seed=0)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "of the 0 examples of task .*none is usable.*Give at least 64"),
        (different(63), "of the 63 examples .*63 are usable.*at least 64.*Give at least 64"),
        (
            [*different(10), *[example("w2", f"w3 w{i}") for i in range(2, 62)]],
            "of the 70 examples .*none is usable.*unequal length \\(60\\), .*few examples have "
            "\\(10\\).*same number of tokens",
        ),
        (
            [example(f"w{i}", "w2", " w5 w6") for i in range(3, 90)],
            "none is usable .*host model small.* more than one token \\(87\\).*or another host",
        ),
        ([example()] * 99, "none is usable.*there twice \\(98\\)"),
    ],
)
def test_too_few_usable_examples_are_said_with_the_reasons(
    small: HostModel, tmp_path: Path, lines: list[dict[str, str]], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        open_task(write(tmp_path, lines), small, examples=64, seed=0)


def test_too_few_examples_cannot_be_asked_for(small: HostModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"circuits\.examples=63.*at least 64"):
        open_task(write(tmp_path, different(99)), small, examples=63, seed=0)


def test_a_host_without_a_tokenizer_cannot_be_asked(host: HostModel) -> None:
    with pytest.raises(InputError, match="has no tokenizer"):
        open_task("ioi", host, examples=64, seed=0)


def test_bos_cannot_be_asked_of_a_tokenizer_without_it(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    host = HostModel(tiny_model("gpt_neox"), tokenizer)
    with pytest.raises(InputError, match="has no BOS"):
        open_task(write(tmp_path, different(99)), host, examples=64, seed=0, prepend_bos=True)
