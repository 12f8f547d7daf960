import pytest
import torch
from tokenizers.processors import TemplateProcessing

from flow_lightning.data.instructions.dataset import InstructionDataset, collate
from flow_lightning.data.instructions.prompts import ALPACA, prompt_splitter
from tests.language import END, TOKENIZER, TRICKY, encode_one, language_module, tiny_tokenizer

NO_GENERATION_PROMPT = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"


@pytest.mark.parametrize("response", TRICKY)
@pytest.mark.parametrize("instruction", TRICKY)
def test_decoding_gives_prompt_and_response_back(instruction, response):
    prompt, answer = prompt_splitter("alpaca", TOKENIZER)(instruction, response)
    ids, length = encode_one(prompt, answer, TOKENIZER)
    assert TOKENIZER.decode(ids[:length]) == ALPACA.replace("{instruction}", instruction)
    assert TOKENIZER.decode(ids[length:]) == response + END
    assert ids.count(TOKENIZER.eos_token_id) == 1
    assert encode_one(prompt, f"{answer}{END}", TOKENIZER) == (ids, length), "not ended twice"


def test_the_beginning_is_marked_once_and_the_prompt_not_ended():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    marks = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|begin|>", END)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"<|begin|> $A {END}", special_tokens=marks)
    assert tokenizer.decode(tokenizer("Q")["input_ids"]) == f"<|begin|>Q{END}"
    ids, length = encode_one("Q", "A", tokenizer)
    assert (tokenizer.decode(ids[:length]), tokenizer.decode(ids[length:])) == ("<|begin|>Q", f"A{END}")
    ids, _ = encode_one("<|begin|>Q", f"A{END}\n", tokenizer, chat=True)
    assert tokenizer.decode(ids) == f"<|begin|>QA{END}"


@pytest.mark.parametrize("template", [None, NO_GENERATION_PROMPT])
@pytest.mark.parametrize("response", ["assistant", *filter(None, TRICKY)])
def test_chat_supervises_the_response_alone(response, template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    dataset = InstructionDataset([{"query": "Hello {x}", "response": response}], tokenizer, template="chat")
    ids, length = dataset[0]["input_ids"], dataset[0]["prompt_length"]
    assert tokenizer.decode(ids[:length]) == f"<|user|>\nHello {{x}}{END}\n<|assistant|>\n"
    assert tokenizer.decode(ids[length:]) == response + END


def test_chat_moves_what_precedes_every_response_to_the_prompt():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}U {{ m['content'] }}\n"
        "{% else %}A <think></think>{{ m['content'] }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A {% endif %}"
    )
    assert prompt_splitter("chat", tokenizer)("1?", "2") == ("U 1?\nA <think></think>", "2\n")
    ids, length = encode_one("U 1?\nA ", "2\n", tokenizer, chat=True)  # this template has no end: it is added
    assert tokenizer.decode(ids[length:]) == f"2\n{END}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "chat_template is not set"),
        ("{{ messages | length }} {% for m in messages %}{{ m['content'] }}{% endfor %}", "does not start with"),
        ("{{ messages[0]['content'] }}", "leaves the response out"),
        (
            "{{ messages[0]['content'] }}"
            "{% if messages | length > 1 %}{% if messages[0]['content'] == '?' %}other{% endif %}"
            "A: {{ messages[1]['content'] }}{% endif %}",
            "does not start with",
        ),
    ],
)
def test_bad_chat_templates_are_explained(template, message):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        prompt_splitter("chat", tokenizer)("?", "!")


def test_a_template_without_instruction_and_a_tokenizer_without_end_are_refused():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match=r"'alpacca' does not contain \{instruction\}\. Use 'alpaca', 'chat'"):
        prompt_splitter("alpacca", tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no end-of-sequence token.*Set tokenizer\.eos_token"):
        encode_one("Q", "A", tokenizer)


@pytest.mark.parametrize("response", ["7", "seven apples", " 7", "\n"])
@pytest.mark.parametrize("prompt", ["How many apples? A: ", "How many apples? A:", "apples\n"])
def test_tokens_are_those_of_the_whole_text_and_one_on_the_border_is_the_responses(prompt, response):
    ids, length = encode_one(prompt, response, TOKENIZER)
    assert ids == [*TOKENIZER(prompt + response)["input_ids"], TOKENIZER.eos_token_id]
    assert prompt.startswith(TOKENIZER.decode(ids[:length])), "the prompt shows nothing of the response"
    assert TOKENIZER.decode(ids[length:]).removesuffix(END).endswith(response)
    alone = TOKENIZER(prompt)["input_ids"]
    assert ids[:length] == alone[:length] and ids[length] != [*alone, None][length]


@pytest.mark.parametrize(("prompt", "response"), [("How many apples? A: ", "seven"), ("How many apples? A:", " seven")])
def test_the_loss_of_a_sample_is_that_of_the_joint_text_also_with_a_token_on_the_border(prompt, response):
    """Transformers' own loss, over the tokens that end behind the prompt; in the first pair one begins before it."""
    whole = TOKENIZER(prompt + response + END, return_offsets_mapping=True, return_tensors="pt")
    ids, spans = whole["input_ids"], whole["offset_mapping"][0]
    assert any(start < len(prompt) < end for start, end in spans.tolist()) == prompt.endswith(" ")
    labels = ids.masked_fill(spans[:, 1] <= len(prompt), -100)
    module = language_module().eval()
    expected = module.causal_lm(input_ids=ids, labels=labels).loss
    dataset = InstructionDataset([{"query": "", "response": response}], TOKENIZER, template=prompt + "{instruction}")
    batch = collate([dataset[0] | {"index": 0}], TOKENIZER.pad_token_id)
    torch.testing.assert_close(module.sample_losses(batch)[0], expected, rtol=1e-5, atol=0)
