"""Facts, questions and micro-batches of the text bridge: what is asked is true, and what is scored is the answer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist

from moiety.bridge.dialogue import UNSCORED, Asking, in_mirror, string_of
from moiety.bridge.facts import (
    ABSTAIN,
    CHOICES,
    DECIDED,
    FITS,
    NUMBERS,
    can_be_denied,
    denied,
    facts_of,
    formula,
    full_name,
    groups_of,
    is_kept_back,
    numbers_of,
    unfit,
)  # fmt: skip
from moiety.bridge.new import new_bridge
from moiety.bridge.objectives import Answering, Contrast, Deciding, Matching, Numbers, Pointing, Preference, Stating
from moiety.bridge.questions import SPLITS, expanded, sentences, statements, worn
from moiety.bridge.rows import (
    CAPTIONS,
    NOTHING,
    QUESTIONS,
    UNPAIRED,
    WORDS,
    Row,
    Writer,
    asking,
    compared,
    in_full,
    nearly,
    unfit_row,
    with_wrong_ones,
)
from moiety.bridge.sources import PAIR, TEXT_NODES, Named, Prose, Together, joined
from moiety.bridge.stages import APART, BridgeDataConfig, BridgeSourceConfig, blinded, composition_only, open_mixture
from moiety.data.shards import Corpus
from moiety.data.structure import Structure
from moiety.data.texts import TextCorpus
from moiety.errors import InputError
from moiety.tokens.batch import with_neighbors

CORPORA = Path(__file__).parent / "data/corpora"
SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def isomers() -> list[Structure]:
    return list(Corpus.open(CORPORA / "isomers", split="train"))


@pytest.fixture(scope="module")
def bridge(base: Path) -> tuple[Any, Any]:
    torch.manual_seed(0)
    return new_bridge(base, new_language=SMALL, bridge={"hidden_size": 32})


def asker(bridge: tuple[Any, Any], text: str = QUESTIONS, **settings: Any) -> Asking:
    model, processor = bridge
    return Asking(processor, model.config.numbers, Writer(text), **settings)


def batch_of(bridge: tuple[Any, Any], structures: list[Structure], text: str = QUESTIONS, **settings: Any) -> Any:
    batch = asker(bridge, text, **settings)(structures, torch.Generator().manual_seed(0))
    return with_neighbors(batch, bridge[0].config.cutoff)


# facts


def test_partners_differ_in_their_answer_alone(isomers: list[Structure]) -> None:
    pairs: dict[str, list[Structure]] = {}
    for structure in isomers:
        pairs.setdefault(structure.groups[PAIR], []).append(structure)
    assert {structure.groups["fact"] for structure in isomers} == set(CHOICES)
    for partners in pairs.values():
        assert len({one.groups["answer"] for one in partners}) == len(partners) in (2, 3)
        assert len({one.node_type.tobytes() for one in partners}) == 1


def test_handed_partners_are_mirror_images(isomers: list[Structure]) -> None:
    hands = [one for one in isomers if one.groups["fact"] == "handedness"]
    first = hands[0]
    partner = next(one for one in hands[1:] if one.groups[PAIR] == first.groups[PAIR])
    np.testing.assert_allclose(in_mirror(first).positions, partner.positions, atol=1e-6)


def test_facts_are_true_of_ethanol() -> None:
    ethanol = Structure(np.array([6, 6, 8, *[1] * 6]), np.random.default_rng(0).normal(size=(9, 3)), text=["CCO"])
    told = {}
    for seed in range(60):
        for fact in facts_of(ethanol, np.random.default_rng(seed)):
            told[fact.name, *fact.about.values()] = fact.answer
    assert told["elements",] == "3" and told["heaviest",] == "oxygen" and told["count", "hydrogen"] == "6"
    assert told["contains", "oxygen"] == "yes" and told["contains", "chlorine"] == "no"
    assert told["rings",] == "0" and told["aromatic",] == "no" and told["donors",] == "1"
    assert told["group", "an alcohol"] == "yes" and told["group", "an ether"] == "no"
    assert formula(ethanol) == "C2H6O"


def test_a_question_that_does_not_fit_is_of_another_domain(isomers: list[Structure]) -> None:
    for structure in isomers:
        fact = unfit(structure, np.random.default_rng(0))
        assert fact.answer == ABSTAIN and FITS[fact.name] != structure.domain


# questions


def test_every_fact_has_a_hundred_ways_to_be_asked_and_none_is_in_two_splits() -> None:
    assert sentences().keys() >= {*CHOICES, *NUMBERS}
    for name, by_split in sentences().items():
        ways = [one.lower() for split in SPLITS for one in by_split[split]]
        assert len(ways) == len(set(ways)) >= 100, name
        assert all(by_split.values()), name
    assert set(CHOICES) <= {name for name, _ in statements()}


def test_words_fall_out_of_a_worn_question_but_none_that_it_is_about() -> None:
    rng = np.random.default_rng(0)
    whole = "Is there any nitrogen in it, or at the least some of it somewhere?"
    found = [worn(whole, ["nitrogen"], rng) for _ in range(50)]
    assert all("nitrogen" in one for one in found) and len(set(found)) > 20
    assert 0.75 < np.mean([len(one.split()) for one in found]) / len(whole.split()) < 0.95
    assert all(worn("Gap?", [], rng) == "Gap?" for _ in range(50))  # else no structure stood before it


def test_frames_expand_to_all_their_sentences() -> None:
    assert expanded("[Is|Was] it [so|]?") == ["Is it so?", "Is it?", "Was it so?", "Was it?"]


def test_training_never_asks_what_is_kept_back() -> None:
    structures = list(Corpus.open(CORPORA / "qm9", split="train"))
    rng = np.random.default_rng(0)
    back = [one for s in structures for one in facts_of(s, rng) if is_kept_back(one, s)]
    assert back
    for _ in range(10):
        for row in Writer(QUESTIONS, described=0, unfitting=0)(structures, rng):
            assert row.fact is not None and not is_kept_back(row.fact, structures[row.about])


# micro-batches


def test_what_is_scored_is_the_answer(bridge: tuple[Any, Any], isomers: list[Structure]) -> None:
    model, processor = bridge
    rows = [Row(0, "R", "Is it R or S?", (0,)), Row(1, "extended", "How is it?", (1,)), Row(1, "Some prose.")]
    batch = asker(bridge).dialogue(isomers[:2], rows)
    for number, said in enumerate((" R</s>", " extended</s>", "Some prose.</s>")):
        scored = batch.targets["answer"][number]
        assert processor.tokenizer.decode(scored[scored != UNSCORED]) == said
        places = batch.logits_to_keep[scored != UNSCORED]
        assert torch.equal(batch.input_ids[number, places + 1], scored[scored != UNSCORED])
    placeholders = (batch.input_ids == model.config.structure_token_id).sum(1)
    assert placeholders.tolist() == [*(batch.num_queries + 2).tolist(), 0]


def test_the_same_micro_batch_is_asked_the_same(bridge: tuple[Any, Any], isomers: list[Structure]) -> None:
    one, two = (batch_of(bridge, isomers[:6], QUESTIONS, mirrored=True) for _ in range(2))
    assert torch.equal(one.input_ids, two.input_ids) and torch.equal(one.positions, two.positions)


def test_a_wrong_row_shows_the_partner(bridge: tuple[Any, Any], isomers: list[Structure]) -> None:
    pair = [one for one in isomers if one.groups["fact"] == "contact"][:2]
    facts = [next(fact for fact in facts_of(s, np.random.default_rng(0)) if fact.kind == "C") for s in pair]
    rows = [asking(fact, place, "train", np.random.default_rng(0)) for place, fact in enumerate(facts)]
    right, other, *wrong = with_wrong_ones(rows, pair)
    assert [(row.read, row.answer, row.right) for row in wrong] == [((1,), right.answer, 0), ((0,), other.answer, 1)]
    batch = asker(bridge).dialogue(pair, [right, other, *wrong])
    assert batch.structure_order.tolist() == [0, 1, 1, 0]


def test_a_bridge_that_ignores_the_structure_loses_the_margin(
    bridge: tuple[Any, Any], isomers: list[Structure]
) -> None:
    model, _ = bridge
    pair = [one for one in isomers if one.groups["fact"] == "contact"][:2]
    batch = batch_of(bridge, pair * 2, contrast=True, see=blinded)
    preference = Preference("preference", margin=2.0)
    scored = preference.scored(batch)
    if not scored.sum():
        pytest.skip("no question of geometry was drawn")
    loss = preference.loss_sum(model(**batch.inputs()), batch).sum() / scored.sum()
    assert loss.item() == pytest.approx(preference.trivial_loss(batch.node_type), abs=1e-3)


def test_two_conformers_are_compared_in_both_orders(isomers: list[Structure]) -> None:
    pair = [one for one in isomers if one.groups["fact"] == "extent"][:2]
    seen = set()
    for seed in range(8):
        (row,) = compared(pair, "test", np.random.default_rng(seed))
        wider = pair[row.read[0 if row.answer == "the first" else 1]]
        assert wider.groups["answer"] == "extended"
        seen.add(row.read)
    assert seen == {(0, 1), (1, 0)}
    assert compared(isomers[:1] + pair[:1], "test", np.random.default_rng(0)) == []


def test_in_words_alone_an_answer_can_be_read_from_the_description(isomers: list[Structure]) -> None:
    writer = Writer(WORDS, "test", 1, 1.0, worn=0.0, described=0.0, unfitting=0.0, told=1.0, comparing=0.0)
    rows = writer(isomers, np.random.default_rng(0))
    for row, structure in zip(rows, isomers, strict=True):
        assert row.read == () and not row.is_caption
        assert row.answer == structure.groups["answer"] and row.answer in row.question


def test_all_that_can_be_said_of_a_structure_names_its_formula_and_every_group() -> None:
    said_of = 0
    for structure in list(Corpus.open(CORPORA / "qm9", split="train"))[:20]:
        said = in_full(structure, np.random.default_rng(0))
        groups = [fact.about["group"] for fact in groups_of(structure)]
        assert said.startswith(formula(structure)) and all(group in said for group in groups)
        said_of += len(groups)
    assert said_of > 10


def test_statements_say_what_tells_partners_apart_and_nothing_else(isomers: list[Structure]) -> None:
    rows = Writer(CAPTIONS, stated=1.0)(isomers, np.random.default_rng(0))
    assert {row.about for row in rows} == set(range(len(isomers)))
    assert all(row.is_statement and isomers[row.about].groups["answer"] in row.answer for row in rows)


def test_matching_and_contrast_know_a_perfect_space(bridge: tuple[Any, Any], isomers: list[Structure]) -> None:
    written = Asking(bridge[1], bridge[0].config.numbers, Writer(CAPTIONS, stated=0.0))
    batch = with_neighbors(written(isomers[:8], torch.Generator().manual_seed(0)), bridge[0].config.cutoff)
    same = (batch.input_ids[:, None] == batch.input_ids[None]).all(-1).float()

    class Perfect:
        structure_embeds, text_embeds = torch.eye(8), 50 * same[:, ~batch.targets["spoiled"]]

    for objective in (Contrast("contrast"), Matching("matching")):
        assert objective.loss_sum(Perfect, batch).sum() < 1e-3
        assert objective.scored(batch).sum() > 0
    assert Answering("answering").scored(batch).sum() == 0


def test_a_caption_learns_what_it_states_right_or_wrong(bridge: tuple[Any, Any], isomers: list[Structure]) -> None:
    model, processor = bridge
    facts = model.config.facts
    rows = Writer(CAPTIONS, stated=0.0)(isomers, np.random.default_rng(0))
    batch = Asking(processor, model.config.numbers, Writer(CAPTIONS), facts=facts).dialogue(isomers, rows)
    stated = batch.targets["stated"]
    wrong = 0
    for number, row in enumerate(rows):
        told = {full_name(fact): fact.answer for fact in row.stated}
        found = {
            name: list(facts[name])[place] for name, place in zip(facts, stated[number], strict=True) if place >= 0
        }
        assert found == {name: answer for name, answer in told.items() if answer in facts.get(name, ())}
        if row.is_spoiled:
            true = {full_name(fact): fact.answer for fact in rows[number - 1].stated}
            changed = [name for name in told if told[name] != true[name]]
            assert len(changed) <= 1
            wrong += len(changed)
    assert wrong > 3
    stating = Stating("stating", facts)
    sure = [50 * torch.eye(len(answers))[stated[:, place].clamp(min=0)] for place, answers in enumerate(facts.values())]
    assert stating.loss_sum(SimpleNamespace(stated_facts=torch.cat(sure, dim=1)), batch).sum() < 1e-3
    batch = with_neighbors(batch, model.config.cutoff)
    assert stating.loss_sum(model(**batch.inputs()), batch).sum() > 1
    assert torch.equal(stating.scored(batch) > 0, torch.ones(len(isomers), dtype=torch.bool))


def test_fact_heads_learn_what_is_true_and_not_kept_back(bridge: tuple[Any, Any], isomers: list[Structure]) -> None:
    model, processor = bridge
    facts = model.config.facts
    asking_facts = Asking(processor, model.config.numbers, Writer(QUESTIONS), facts=facts)
    structures = [*isomers, *list(Corpus.open(CORPORA / "qm9", split="train"))[:30]]
    batch = asking_facts(structures, torch.Generator().manual_seed(0))
    target = batch.targets["facts"]
    known = 0
    for place, structure in enumerate(structures):
        told = {fact.name: fact for fact in facts_of(structure, np.random.default_rng(0)) if fact.name in DECIDED}
        for name, fact in told.items():
            answer = target[place, list(facts).index(name)]
            assert (answer == UNSCORED) == is_kept_back(fact, structure)
            assert answer == UNSCORED or list(facts[name])[answer] == fact.answer
            known += int(answer != UNSCORED)
    assert known > 60
    deciding = Deciding("deciding", facts)
    sure = [50 * torch.eye(len(answers))[target[:, place].clamp(min=0)] for place, answers in enumerate(facts.values())]

    class Right:
        fact_logits = torch.cat(sure, dim=1)

    assert deciding.loss_sum(Right, batch).sum() < 1e-3 < deciding.scored(batch).sum()
    read = with_neighbors(batch, model.config.cutoff)
    assert model(**read.inputs()).fact_logits.shape == Right.fact_logits.shape


def test_a_pointer_learns_the_fact_that_is_asked_where_its_answers_differ(
    bridge: tuple[Any, Any], isomers: list[Structure]
) -> None:
    model, processor = bridge
    facts = model.config.facts
    rng = np.random.default_rng(0)
    rows = [asking(fact, place, "train", rng) for place, one in enumerate(isomers) for fact in facts_of(one, rng)]
    rows += [unfit_row(one, place, "train", rng) for place, one in enumerate(isomers)]
    batch = Asking(processor, model.config.numbers, Writer(QUESTIONS), facts=facts).dialogue(isomers, rows)
    answer, pointed = batch.targets["answer"], batch.targets["pointed"]
    assert torch.equal(answer == UNSCORED, pointed == UNSCORED)
    found = set()
    for row, own, chosen in zip(rows, answer, pointed, strict=True):
        name = full_name(row.fact)
        places = (chosen > 0).nonzero().flatten()
        assert len(places) == (row.answer in facts.get(name, ()))
        for place in places:
            assert list(facts)[chosen[place] - 1] == name and own[place] == facts[name][row.answer]
            found.add((row.fact.name, row.answer == ABSTAIN))
    assert {("handedness", False), ("contact", False), ("elements", False), ("rings", True)} <= found
    sure = 50 * torch.eye(1 + len(facts))[pointed.clamp(min=0)]
    pointing = Pointing("pointing")
    assert pointing.loss_sum(SimpleNamespace(fact_choices=sure), batch).sum() < 1e-3 < pointing.scored(batch).sum()


def test_a_string_stands_where_no_structure_is_seen(bridge: tuple[Any, Any], isomers: list[Structure]) -> None:
    molecules = [one for one in isomers if one.domain == "molecule"][:4]
    rows = Writer(QUESTIONS, worn=0.0, unfitting=0.0, described=0.0, comparing=0.0)(molecules, np.random.default_rng(0))
    assert len(rows) > len(molecules)
    tokenizer = bridge[1].tokenizer
    for string in (False, True):
        batch = asker(bridge, string=string).dialogue(molecules, rows)
        assert (batch.structure_order.shape[0] == 0) == string
        for row, ids, learned in zip(rows, batch.input_ids, batch.targets["answer"], strict=True):
            assert tokenizer.decode(learned[learned >= 0]).removesuffix(tokenizer.eos_token).strip() == row.answer
            text = tokenizer.decode(ids)
            assert row.question in text and (string_of(molecules[row.about]) in text) == string


def test_a_text_of_nothing_is_one_row_that_reads_no_structure(
    bridge: tuple[Any, Any], isomers: list[Structure]
) -> None:
    batch = batch_of(bridge, isomers[:6], NOTHING)
    assert batch.input_ids.shape[0] == 1 and not len(batch.structure_order)
    facts = bridge[0](**batch.inputs()).fact_logits
    assert facts.shape == (6, sum(map(len, bridge[0].config.facts.values())))


def test_a_spoiled_caption_is_wrong_in_one_thing(isomers: list[Structure]) -> None:
    rng = np.random.default_rng(0)
    molecules = [one for one in isomers if one.domain == "molecule"]
    for structure in molecules:
        other = nearly(structure, rng)
        assert formula(other) != formula(structure)
        assert np.isin(other.node_type, UNPAIRED).sum() % 2 == 0
        facts = [fact for fact in facts_of(structure, rng) if can_be_denied(fact)]
        assert all(denied(fact, rng).answer != fact.answer for fact in facts)
    rows = Writer(CAPTIONS, stated=0.0)(molecules, rng)
    assert [row.is_spoiled for row in rows] == [False, True] * len(molecules)
    for right, spoiled in zip(rows[::2], rows[1::2], strict=True):
        pieces = [row.answer.replace(". ", "; ").split("; ") for row in (right, spoiled)]
        assert sum(one != two for one, two in zip(*pieces, strict=True)) == 1
    assert not any(row.is_spoiled for row in Writer(WORDS)(molecules, rng))


def test_numbers_are_learned_of_every_structure_that_has_them(bridge: tuple[Any, Any]) -> None:
    model, processor = bridge
    structures = list(Corpus.open(CORPORA / "qm9", split="train"))[:8]
    written = Asking(processor, model.config.numbers, Writer(CAPTIONS))
    batch = with_neighbors(written(structures, torch.Generator().manual_seed(0)), model.config.cutoff)
    by_name = [{fact.name: not is_kept_back(fact, s) for fact in numbers_of(s)} for s in structures]
    known = torch.tensor([[facts[name] for name in model.config.numbers] for facts in by_name])
    targets, objective = batch.targets["numbers"], Numbers("numbers")
    assert torch.equal(~targets.isnan(), known) and objective.scored(batch).tolist() == known.any(1).float().tolist()
    gap = NUMBERS["gap"]
    place = list(model.config.numbers).index("gap")
    assert float(targets[1, place]) == pytest.approx((structures[1].scalars["gap"] - gap["mean"]) / gap["std"])
    output = model(**batch.inputs())
    output.number_values, output.number_log_sigmas = targets.nan_to_num(), torch.zeros_like(targets)
    assert objective.loss_sum(output, batch).abs().max() < 1e-6
    output.number_values = targets.nan_to_num() + 1
    assert objective.loss_sum(output, batch).tolist() == pytest.approx((0.5 * known.any(1)).tolist())


def test_controls_see_what_they_should(isomers: list[Structure]) -> None:
    one, two = (s for s in isomers if s.groups[PAIR] == isomers[0].groups[PAIR])
    np.testing.assert_array_equal(composition_only(one).positions, composition_only(two).positions)
    np.testing.assert_array_equal(composition_only(one).node_type, composition_only(two).node_type)
    assert blinded(one).num_nodes == 1 and string_of(one) == string_of(two)
    long = composition_only(Structure(np.ones(500, dtype=np.int64), np.zeros((500, 3))))
    assert pdist(long.positions).min() == APART and np.ptp(long.positions, axis=0).max() < 1000


# sources


def test_partners_are_read_together(isomers: list[Structure]) -> None:
    corpus = Corpus.open(CORPORA / "isomers", split="train")
    together = Together.partners(corpus)
    assert together.num_nodes.sum() == corpus.num_nodes.sum() + TEXT_NODES * len(corpus)
    for number in range(len(together)):
        assert len({one.groups[PAIR] for one in together.read([number])}) == 1
    with pytest.raises(InputError, match="without partners"):
        Together.partners(Corpus.open(CORPORA / "qm9", split="train"))
    alike = Together.of_one_composition(Corpus.open(CORPORA / "qm9", split="train"), 0)
    for number in range(len(alike)):
        assert len({np.sort(one.node_type).tobytes() for one in alike.read([number])}) == 1


def test_a_micro_batch_joins_packs_of_several_sources() -> None:
    listed = (BridgeSourceConfig(str(CORPORA / "isomers"), "partners"), BridgeSourceConfig(str(CORPORA / "qm9")))
    joined_ones, alone = (open_mixture(BridgeDataConfig(listed, packs=packs)) for packs in (4, 1))
    for number in range(5):
        packs = [one.id for pack in range(4 * number, 4 * number + 4) for one in alone.structures(pack)]
        assert [one.id for one in joined_ones.structures(number)] == packs
        assert {one.source for one in joined_ones.structures(number, whole=True)} == {"isomers", "qm9"}
    assert joined_ones.digest("", 0, 2) == alone.digest("", 0, 8) != joined_ones.digest("", 0, 1)
    assert joined_ones.facts != alone.facts


def test_prose_comes_in_pieces() -> None:
    assert joined(["a" * 4, "b" * 5, "c" * 12], 10) == ["aaaa\nbbbbb", "c" * 10, "cc"]
    prose = Prose(TextCorpus.open(CORPORA / "english", split="train"), letters=200)
    (piece,) = prose.read([0])
    assert 0 < len(piece.text[0]) <= 201 and piece.num_nodes == 1
    assert prose.ids()[0] == piece.id


def test_structures_are_described_by_their_own_texts(bridge: tuple[Any, Any]) -> None:
    named = Named(Corpus.open(CORPORA / "ccd"), TextCorpus.open(CORPORA / "texts"))
    structures = named.read(range(len(named)))
    rows = Writer(CAPTIONS)(structures, np.random.default_rng(0))
    assert all(row.answer in structures[row.about].text and row.is_caption for row in rows)
    asked = Writer(QUESTIONS)(structures, np.random.default_rng(0))
    assert all(row.question in sentences()["name"]["train"] for row in asked)
    with pytest.raises(InputError, match="no text belongs to"):
        Named(Corpus.open(CORPORA / "isomers"), TextCorpus.open(CORPORA / "texts"))
