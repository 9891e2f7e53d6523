"""The text bridge keeps the contract of transformers: generate, processors, Auto classes, pipelines, peft, Trainer."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

from moiety.bridge.export import load_bridge, save_bridge
from moiety.bridge.new import deciding_tokens, new_bridge, take_over
from moiety.bridge.stages import LORA_TARGETS
from moiety.errors import InputError
from moiety.models.modeling_bridge_moiety import STRUCTURE_INPUTS
from moiety.models.processing_bridge_moiety import PLACEHOLDER
from moiety.models.vocabulary_moiety import ELEMENT_NAMES

ROOT = Path(__file__).parents[1]
SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip
QUESTION = f"{PLACEHOLDER} What is it?"
BLOCKS = [{"type": "structure", "structure": molecule("CH3CH2OH")}, {"type": "text", "text": "What is it?"}]
CHAT = [{"role": "user", "content": BLOCKS}]
REMOTE = """
import sys
sys.modules.update(dict.fromkeys("moiety deepspeed torch_geometric peft rdkit pymatgen biotite".split()))
from ase.build import molecule
from transformers import AutoModelForMultimodalLM, AutoProcessor, pipeline

folder = sys.argv[1]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True).eval()
inputs = processor(text=["<structure> What is it?"], structures=[molecule("CH3CH2OH")])
print("words", model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, -6:].tolist())
print("answer", repr(model.ask(processor, molecule("CH3CH2OH"), "What is it?", choices=["yes", "no"]).answer))
"""


@pytest.fixture(scope="module")
def bridge(base: Path) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model, processor = new_bridge(base, new_language=SMALL, bridge={"hidden_size": 32})
    return model.eval(), processor


@pytest.fixture(scope="module")
def saved(bridge: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bridge") / "export"
    save_bridge(*bridge, folder)
    return folder


def asked(processor: Any, *structures: Any, question: str = QUESTION) -> Any:
    return processor(text=[question] * len(structures), structures=list(structures))


@torch.no_grad()
def last_logits(bridge: tuple[Any, Any], structure: Any) -> torch.Tensor:
    model, processor = bridge
    return model(**asked(processor, structure)).logits[0, -1]


def test_greedy_words_are_those_without_a_cache(bridge: tuple[Any, Any]) -> None:
    model, processor = bridge
    inputs = asked(processor, molecule("CH3CH2OH"), molecule("C6H6"))
    words = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    structures = {name: inputs[name] for name in STRUCTURE_INPUTS if name in inputs}
    for _ in range(6):
        with torch.no_grad():
            most_likely = model(input_ids=ids, attention_mask=mask, **structures).logits[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, most_likely], 1), torch.cat([mask, torch.ones_like(most_likely)], 1)
    assert torch.equal(words, ids)


def test_a_row_that_is_padded_on_the_left_says_what_it_says_alone(bridge: tuple[Any, Any]) -> None:
    model, processor = bridge
    pair = processor(
        text=[f"{PLACEHOLDER} What?", f"{PLACEHOLDER} How many rings does this molecule have, of all kinds?"],
        structures=[molecule("H2O"), molecule("C6H6")],
    )
    alone = processor(text=[f"{PLACEHOLDER} What?"], structures=[molecule("H2O")])
    assert pair["attention_mask"][0, 0] == 0
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**pair, **settings)[0, -6:], model.generate(**alone, **settings)[0, -6:])
    with torch.no_grad():
        torch.testing.assert_close(model(**pair).logits[0, -1], model(**alone).logits[0, -1], rtol=1e-4, atol=1e-5)


def test_beams_and_several_sequences_read_the_structures_once(bridge: tuple[Any, Any]) -> None:
    model, processor = bridge
    inputs = asked(processor, molecule("CH3CH2OH"), molecule("C6H6"))
    beams = model.generate(**inputs, max_new_tokens=4, num_beams=3, num_return_sequences=2, eos_token_id=None)
    assert beams.shape == (4, inputs["input_ids"].shape[1] + 4)
    one = model.generate(
        **asked(processor, molecule("CH3CH2OH")), max_new_tokens=4, num_beams=3, num_return_sequences=2,
        eos_token_id=None,
    )  # fmt: skip
    assert torch.equal(beams[:2, -4:], one[:, -4:])
    drawn = model.generate(**inputs, max_new_tokens=4, do_sample=True, num_return_sequences=3, eos_token_id=None)
    assert len(drawn) == 6


def test_several_structures_stand_in_one_prompt(bridge: tuple[Any, Any]) -> None:
    model, processor = bridge
    text = f"{PLACEHOLDER} {PLACEHOLDER} Which is larger?"
    there = processor(text=[text], structures=[molecule("H2O"), molecule("C6H6")])
    back = processor(text=[text], structures=[molecule("C6H6"), molecule("H2O")])
    with torch.no_grad():
        assert not torch.allclose(model(**there).logits[0, -1], model(**back).logits[0, -1])
    with pytest.raises(ValueError, match="2 <structure> for 1 structures"):
        processor(text=[text], structures=[molecule("H2O")])


def test_the_answer_is_the_same_however_the_structure_is_turned_and_numbered(bridge: tuple[Any, Any]) -> None:
    atoms = molecule("CH3CH2OH")
    said = last_logits(bridge, atoms)
    turned = atoms.copy()
    turned.rotate(40, (1, 2, 3))
    turned.translate((3, -2, 1))
    renumbered = atoms[np.random.default_rng(0).permutation(len(atoms))]
    for other in (turned, renumbered):
        torch.testing.assert_close(last_logits(bridge, other), said, rtol=1e-3, atol=1e-4)
    crystal = bulk("NaCl", "rocksalt", 5.64)
    torch.testing.assert_close(
        last_logits(bridge, crystal * (2, 2, 2)), last_logits(bridge, crystal), rtol=1e-3, atol=1e-4
    )


def test_mirror_images_differ_in_the_hand_alone(bridge: tuple[Any, Any]) -> None:
    model, processor = bridge
    hand = molecule("CH3CH2OH")
    hand.rattle(0.2, seed=1)
    mirrored = hand.copy()
    mirrored.positions[:, 0] *= -1
    one, other = (
        model.read_structures(**{k: v for k, v in asked(processor, a).items() if k in STRUCTURE_INPUTS})
        for a in (hand, mirrored)
    )
    torch.testing.assert_close(one.even, other.even, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.tokens[:-2], other.tokens[:-2], rtol=1e-4, atol=1e-5)
    changed = (one.fact_logits - other.fact_logits).abs().amax(0) > 1e-4
    names = [name for name, answers in model.config.facts.items() for _ in answers]
    assert {name for name, moved in zip(names, changed, strict=True) if moved} == {"handedness"}
    torch.testing.assert_close(one.odd, -other.odd, rtol=1e-3, atol=1e-4)
    assert one.odd.abs().max() > 0.1


def pointing_at(bridge: tuple[Any, Any], fact: str) -> Any:
    """A copy of the model that says nothing else."""
    model = copy.deepcopy(bridge[0])
    parts = sorted({part for name in model.config.facts for part in name.split(" ", 1)})
    with torch.no_grad():
        model.pointer.part.bias[[parts.index(part) for part in fact.split(" ", 1)]] = 50.0
    return model


def test_a_pointer_says_what_heads_decided_of_the_structure_that_stands_last(bridge: tuple[Any, Any]) -> None:
    model, processor = pointing_at(bridge, "rings"), bridge[1]
    place = list(model.config.facts).index("rings")
    with torch.no_grad():
        inputs = processor(
            text=[f"{PLACEHOLDER} and {PLACEHOLDER} say", "Say what you say"],
            structures=[molecule("C6H6"), molecule("H2O")],
        )
        output = model(**inputs)
        assert output.fact_logits is not None
        share = output.fact_logits[1].split([len(answers) for answers in model.config.facts.values()])[place].softmax(0)
        said = output.logits[0, -1].exp()[list(model.config.facts["rings"].values())]
        torch.testing.assert_close(said, share, rtol=1e-3, atol=1e-4)
        plain = processor(text=["Say what you say"])
        torch.testing.assert_close(output.logits[1, -1], model.language_model(**plain).logits[0, -1])
    words = model.generate(**inputs, max_new_tokens=2, do_sample=False, eos_token_id=None)[0, -2:]
    assert words.tolist() == [model.config.facts["rings"][str(int(share.argmax()))]] * 2


@pytest.mark.parametrize(
    ("atoms", "known"),
    [
        (
            molecule("CH3CH2OH"),
            {
                "elements": "3",
                "heaviest": "oxygen",
                "count hydrogen": "6",
                "contains carbon": "yes",
                "contains gold": "no",
            },
        ),
        (bulk("ZnS", "zincblende", 5.4) * (2, 1, 1), {"elements": "2", "contains sulfur": "yes", "count sulfur": "1"}),
    ],
)
def test_what_is_known_of_the_composition_is_counted(
    bridge: tuple[Any, Any], atoms: Any, known: dict[str, str]
) -> None:
    model, processor = bridge
    found = model(**processor(text=[PLACEHOLDER], structures=[atoms])).fact_logits[0]
    parts = found.split([len(answers) for answers in model.config.facts.values()])
    assert known.keys() <= model.config.facts.keys()
    for (name, answers), logits in zip(model.config.facts.items(), parts, strict=True):
        if name in known:
            assert list(answers)[int(logits.argmax())] == known[name] and logits.softmax(0).max() > 0.999


def test_what_is_asked_and_of_what_are_pointed_at_each_by_itself(bridge: tuple[Any, Any]) -> None:
    model, processor = pointing_at(bridge, "count carbon"), bridge[1]
    with torch.no_grad():
        output = model(**processor(text=[PLACEHOLDER], structures=[molecule("CH3CH2OH")]))
    assert int(output.fact_choices[0, -1].argmax()) == 1 + list(model.config.facts).index("count carbon")
    assert int(output.logits[0, -1].argmax()) == model.config.facts["count carbon"]["2"]


def test_a_fact_of_which_no_answer_can_be_leaves_the_word_to_the_language_model(bridge: tuple[Any, Any]) -> None:
    model, processor = pointing_at(bridge, "count hydrogen"), bridge[1]
    with torch.no_grad():
        inputs = processor(text=[PLACEHOLDER] * 2, structures=[molecule("isobutane"), molecule("CH3SH")])
        output = model(**inputs)
        embeds = model.read(inputs["input_ids"], {name: inputs[name] for name in STRUCTURE_INPUTS if name in inputs})
        own = model.language_model(inputs_embeds=embeds.embeds, attention_mask=inputs["attention_mask"])
    torch.testing.assert_close(output.logits[0, -1], own.logits[0, -1].log_softmax(-1))
    assert int(output.logits[1, -1].argmax()) == model.config.facts["count hydrogen"]["4"]


def test_of_two_structures_is_said_which_rather_has_an_answer(bridge: tuple[Any, Any]) -> None:
    model, processor = pointing_at(bridge, "wider"), bridge[1]
    answers = model.config.facts["wider"]
    molecules = [molecule("C6H6"), molecule("CH3CH2OH")]
    said = []
    for pair in (molecules, molecules[::-1]):
        with torch.no_grad():
            output = model(**processor(text=[f"{PLACEHOLDER} {PLACEHOLDER}"], structures=pair))
        said.append(output.logits[0, -1].exp()[list(answers.values())])
        logits = output.fact_logits.split([len(own) for own in model.config.facts.values()], dim=1)
        place = list(model.config.facts["extent"]).index("extended")
        extended = logits[list(model.config.facts).index("extent")].softmax(1)[:, place].logit()
        odds = extended[0] - extended[1]
        torch.testing.assert_close(said[-1], torch.stack([odds, -odds]).sigmoid(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(said[0], said[1].flip(0), rtol=1e-3, atol=1e-4)
    assert (said[0][0] - 0.5).abs() > 0.01


def test_a_text_without_structures_is_that_of_the_language_model(bridge: tuple[Any, Any]) -> None:
    model, processor = bridge
    inputs = processor(text=["What is a molecule?"])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model.language_model(**inputs).logits)


def test_the_baseline_has_as_many_tokens_as_are_asked_for(base: Path) -> None:
    torch.manual_seed(0)
    model, processor = new_bridge(base, new_language=SMALL, bridge={"hidden_size": 32, "kind": "mlp"})
    large = bulk("Cu", cubic=True).repeat(3)
    large.pbc = False
    inputs = asked(processor, molecule("CH3CH2OH"), large)
    assert inputs["num_queries"].tolist() == [8, 32]
    model.eval()
    with torch.no_grad():
        together = model(**inputs).logits[:, -1]
        alone = torch.stack([last_logits((model, processor), one) for one in (molecule("CH3CH2OH"), large)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_a_prompt_tells_nothing_of_a_structure_and_a_supercell_has_the_same(bridge: tuple[Any, Any]) -> None:
    _, processor = bridge
    salt = bulk("NaCl", "rocksalt", a=5.64)
    texts = [
        processor.tokenizer.decode(processor(text=[f"{PLACEHOLDER} What?"], structures=[one])["input_ids"][0])
        for one in (salt, salt.repeat((2, 1, 1)), molecule("CH3CH2OH"))
    ]
    assert texts[0] == texts[1] == texts[2] and texts[0].replace(PLACEHOLDER, "").strip() == "What?"


def test_a_language_model_from_a_directory_gets_the_tokens_that_it_lacks(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tokenizers/text")
    language = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **SMALL))
    language.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, processor = new_bridge(base, tmp_path, bridge={"hidden_size": 32})
    inputs = processor(text=[f"{PLACEHOLDER} <num:gap>"], structures=[molecule("H2O")])
    assert model(**inputs).logits.shape[-1] == len(processor.tokenizer) > len(tokenizer)
    words = model.get_input_embeddings().get_parameter("weight")[: len(tokenizer)]
    assert torch.equal(words, language.get_input_embeddings().weight)


def test_chats_hold_structures_in_blocks(bridge: tuple[Any, Any]) -> None:
    _, processor = bridge
    settings = {"add_generation_prompt": True, "tokenize": True}
    inputs = processor.apply_chat_template(CHAT, return_dict=True, return_tensors="pt", **settings)
    whole = processor.apply_chat_template(CHAT, add_generation_prompt=True)
    assert whole == f"<s>{PLACEHOLDER} What is it?\n"
    placeholder = processor.tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    assert (inputs["input_ids"] == placeholder).sum() == 8 + 2  # queries, and the hand
    two = processor.apply_chat_template([CHAT, CHAT], return_dict=True, return_tensors="pt", **settings)
    assert torch.equal(two["input_ids"][1], inputs["input_ids"][0]) and len(two["num_queries"]) == 2


def test_what_is_seen_stays_where_the_language_model_is_another(bridge: tuple[Any, Any], base: Path) -> None:
    before = bridge[0]
    after, _ = new_bridge(base, new_language=SMALL | {"hidden_size": 48}, bridge={"hidden_size": 32})
    take_over(after, before)
    assert after.config.text_config.hidden_size == 48
    own, seen = after.state_dict(), before.state_dict()
    names = [name for name in seen if name.startswith(("tower.", "bridge.", "number_head."))]
    changed = {name for name in names if not torch.equal(seen[name], own[name])}
    assert changed == {f"bridge.{part}.{kind}" for part in ("out", "hand.out") for kind in ("weight", "bias")}
    other, _ = new_bridge(base, new_language=SMALL, bridge={"hidden_size": 48})
    with pytest.raises(InputError, match="another tower, bridge or facts"):
        take_over(other, before)


def test_what_is_saved_says_the_same(bridge: tuple[Any, Any], saved: Path) -> None:
    model, processor = bridge
    again, its_processor = load_bridge(saved)
    auto = AutoModelForMultimodalLM.from_pretrained(saved).eval()
    inputs = asked(AutoProcessor.from_pretrained(saved), molecule("CH3CH2OH"))
    with torch.no_grad():
        before = model(**asked(processor, molecule("CH3CH2OH")))
        after = again.eval()(**asked(its_processor, molecule("CH3CH2OH")))
        for name in ("logits", "number_values", "fact_logits"):
            torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(auto(**inputs).logits, before.logits, rtol=1e-5, atol=1e-6)


def test_the_export_needs_no_moiety(bridge: tuple[Any, Any], saved: Path, tmp_path: Path) -> None:
    environment = {"HF_HOME": str(tmp_path), "PATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", REMOTE, str(saved)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    model, processor = bridge
    words = model.generate(**asked(processor, molecule("CH3CH2OH")), max_new_tokens=6, do_sample=False)[0, -6:].tolist()
    assert f"words {words}" in done.stdout and "answer" in done.stdout, done.stderr


def test_the_any_to_any_pipeline_answers(bridge: tuple[Any, Any], saved: Path) -> None:
    (said,) = pipeline("any-to-any", model=str(saved))(text=CHAT, max_new_tokens=3, return_full_text=False)
    assert isinstance(said["generated_text"], str)


def test_stock_lora_adapts_the_language_model_alone(bridge: tuple[Any, Any], saved: Path, tmp_path: Path) -> None:
    model, processor = load_bridge(saved)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=LORA_TARGETS))
    names = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert names and all(".language_model." in name and "lora_" in name for name in names)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    inputs = asked(processor, molecule("CH3CH2OH"))
    said = adapted.generate(**inputs, max_new_tokens=3, do_sample=False)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_bridge(saved)[0], tmp_path)
    assert torch.equal(again.generate(**inputs, max_new_tokens=3, do_sample=False), said)


def test_the_trainer_of_transformers_trains_it(saved: Path, tmp_path: Path) -> None:
    model, processor = load_bridge(saved)

    def collate(structures: list[Any]) -> dict[str, Any]:
        inputs = processor(text=[f"{QUESTION}\n water</s>"] * len(structures), structures=structures)
        return {**inputs, "labels": inputs["input_ids"]}

    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no",
        remove_unused_columns=False, learning_rate=1e-2,
    )  # fmt: skip
    data: Any = [molecule("H2O"), molecule("C6H6"), molecule("NH3"), molecule("CH4")]
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=data)
    before = model.bridge.out.weight.clone()
    assert np.isfinite(trainer.train().training_loss)
    assert not torch.equal(before, model.bridge.out.weight)


def test_a_number_head_that_is_standardised_again_says_the_same(bridge: tuple[Any, Any]) -> None:
    model, processor = copy.deepcopy(bridge[0]), bridge[1]
    inputs = processor(text=[PLACEHOLDER] * 3, structures=[molecule(name) for name in ("C6H6", "H2O", "CH3CH2OH")])
    with torch.no_grad():
        found = model.read_structures(**{name: inputs[name] for name in STRUCTURE_INPUTS if name in inputs})
        before, read = model.number_head(found), model.number_head.read(found)
        for some in (read, read[:2]):
            model.number_head.standardise(some)
            for one, other in zip(before, model.number_head(found), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.number_head.center, read[:2].mean(0))


def test_the_name_of_an_element_is_one_token_and_elsewhere_first_ones_may_be_shared() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tokenizers/text")
    assert all(len(tokenizer.tokenize(f" {name}")) == 1 for name in ELEMENT_NAMES)
    answers = ["1", "12", "22"]
    with pytest.raises(InputError, match="tells 1, 12, 22 apart"):
        deciding_tokens(answers, tokenizer)
    one, twelve, more = deciding_tokens(answers, tokenizer, may_share=True).values()
    assert one == twelve != more


@pytest.mark.parametrize("first", ["configuration_bridge_moiety", "modeling_bridge_moiety"])
def test_whatever_is_imported_first_auto_classes_know_the_bridge(first: str) -> None:
    script = f"""
import moiety.models.{first}
from transformers import AutoConfig, AutoModelForMultimodalLM
assert AutoModelForMultimodalLM._model_mapping[type(AutoConfig.for_model("moiety_bridge"))]
"""
    subprocess.run([sys.executable, "-c", script], check=True)
