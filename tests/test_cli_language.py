"""Every shipped language configuration through the real command line, on a tiny model and without network."""

import json
import shlex
from pathlib import Path

import pytest
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM
from yaml import safe_load

import flow_lightning as fl
from flow_lightning.__main__ import main
from flow_lightning.report.metrics import read_metrics
from tests.examples import slow
from tests.hub import SOLUTION, index_of_hub, write_hub
from tests.language import TOKENIZER, instructions, tiny_model, write_jsonl

CONFIGS = Path(__file__).parent.parent / "configs" / "language"
PAPER = ["gemma2_2b_metamathqa", "llama32_3b_metamathqa"]
TINY = shlex.split("""
    --model.model=tiny --model.attention=null --trainer.accelerator=cpu --trainer.precision=32-true
    --trainer.max_epochs=1 --trainer.accumulate_grad_batches=2
    --trainer.enable_progress_bar=false --trainer.enable_model_summary=false
""")


@pytest.fixture(autouse=True)
def tiny_folders():
    TOKENIZER.save_pretrained("tiny")
    tiny_model(len(TOKENIZER)).save_pretrained("tiny")
    write_jsonl(Path("train.jsonl"), instructions(9))


def run(*arguments, method="standard", command="fit"):
    return main([command, *arguments, f"--method={method}", *TINY])


def metrics_of(cli):
    return read_metrics(Path(cli.trainer.log_dir) / "metrics.json")


@pytest.mark.parametrize(
    ("config", "method", "tune"),
    [
        slow(PAPER[0], "standard", "full"),
        slow(PAPER[0], "flow_token", "lora"),
        (PAPER[1], "token_masking", "lora"),
        slow(PAPER[1], "flow_sequence", "full"),
    ],
)
def test_every_configuration_composes_with_methods_and_adapters(config, method, tune):
    extra = ["-c=lora"] if tune == "lora" else []
    cli = run(f"-c={config}", *extra, "--data.train=train.jsonl", "--data.batch_size=2", method=method)
    folder = Path(cli.trainer.log_dir) / "model"
    assert cli.model.tune == tune and (folder / "tokenizer.json").is_file()
    assert (folder / ("adapter_config.json" if tune == "lora" else "config.json")).is_file()
    assert ("flow/temperature" in metrics_of(cli)) == (method != "standard") and cli.model.sample_weights is None


@pytest.mark.slow
def test_a_variant_of_lora_is_an_option_and_combines_with_flow():
    options = ["-c=lora", "--data.train=train.jsonl", "--data.batch_size=2", "--model.lora_options.use_dora=true"]
    cli = run("-c=llama32_3b_metamathqa", *options, method="flow_sequence")
    folder = Path(cli.trainer.log_dir) / "model"
    assert json.loads((folder / "adapter_config.json").read_text())["use_dora"]
    assert "flow/temperature" in metrics_of(cli) and cli.model.model.peft_config["default"].r == 64


def test_the_configurations_hold_the_papers_hyperparameters():
    assert sorted(path.stem for path in CONFIGS.glob("*_metamathqa.yaml")) == PAPER
    for name in PAPER:
        settings = safe_load((CONFIGS / f"{name}.yaml").read_text())
        model, data = settings["model"]["init_args"], settings["data"]["init_args"]
        assert settings["trainer"]["accumulate_grad_batches"] * data["batch_size"] == 128
        assert (settings["trainer"]["max_epochs"], settings["seed_everything"]) == (2, 42)
        assert 1e-5 <= settings["learning_rate"] <= 2e-5
        assert (model["schedule"], model["warmup"], data["max_length"]) == ("cosine", 0.03, 1024)
        assert model["optimizer"]["init_args"]["weight_decay"] == 0
    lora = safe_load((CONFIGS / "lora.yaml").read_text())["model"]["init_args"]
    assert (lora["lora_r"], lora["lora_alpha"], lora["lora_dropout"], len(lora["lora_targets"])) == (64, 64, 0, 7)


def test_the_quickstart_learns_reports_and_saves():
    options = ["--data.train=generated:arithmetic:16", "--data.test=generated:arithmetic:5"]
    cli = run("-c=language/quickstart", *options, method="flow_sequence")
    metrics = metrics_of(cli)
    assert {"target/before/loss", "target/loss", "target/exact_match", "flow/temperature"} <= set(metrics)
    assert {"retention/before/perplexity", "retention/after/perplexity"} <= set(metrics)
    AutoModelForCausalLM.from_pretrained(Path(cli.trainer.log_dir) / "model")


def test_score_writes_the_weights_of_every_token():
    cli = run(f"-c={PAPER[0]}", "--data.train=train.jsonl", method="flow_token", command="score")
    weights = fl.TokenWeights.load(Path(cli.trainer.log_dir) / "flow_weights.safetensors")
    assert len(weights) == 9 and cli.trainer.global_step == 0
    assert weights.losses.numel() == int(cli.datamodule.train_set.dataset.supervised.sum())


@pytest.mark.parametrize("config", PAPER)
def test_the_papers_tasks_go_on_top_of_a_configuration(config, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(f"-c={config}", "-c=paper_tasks", "--print_config")
    assert stopped.value.code in (0, None)
    target, general = safe_load(capsys.readouterr().out)["retention"]["measures"]
    assert target["init_args"]["tasks"] == {"gsm8k": ["gsm8k:5"]}
    assert list(general["init_args"]["tasks"]) == ["commonsense", "mmlu", "mbpp"]


def test_one_command_fits_and_makes_the_papers_table_from_local_files(monkeypatch):
    """All tasks are the harness's own. The model's first answer in two is replaced by the right one."""
    write_hub()
    monkeypatch.setattr("flow_lightning.measures.harness._own_index", index_of_hub)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path("cache").absolute())
    model = tiny_model(len(TOKENIZER))
    model.config.max_position_embeddings = 4096
    model.save_pretrained("tiny")
    generate, prompts = HFLM.generate_until, []

    def half_right(self, requests, **settings):
        answers = generate(self, requests, **settings)
        prompts.append(requests[0].args[0])
        return [SOLUTION if "Python" in prompts[-1] else "#### 4", *answers[1:]]

    monkeypatch.setattr(HFLM, "generate_until", half_right)
    monkeypatch.setattr(HFLM, "max_gen_toks", 8)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # lists all packages by pip
    options = [f"-c={PAPER[0]}", "-c=paper_tasks", "--data.train=train.jsonl", "--data.batch_size=2", *TINY]
    main(["compare", *options, "--methods=[flow_sequence]", "--output=runs/paper"])
    (metrics,) = json.loads(Path("runs/paper/comparison.json").read_text())["flow_sequence"]
    assert len(prompts) == 4 and metrics["target/accuracy"] == metrics["retention/after/group/mbpp"] == 0.5
    assert sorted(prompt.count("Question:") for prompt in prompts) == [0, 0, 6, 6], "five examples and the question"
    assert sorted(prompt.count("[BEGIN]") for prompt in prompts) == [0, 0, 4, 4], "three examples and the task"
    commonsense = ["hellaswag", "arc_easy", "arc_challenge", "piqa", "social_iqa", "openbookqa"]
    mean = sum(metrics[f"retention/after/task/{name}"] for name in commonsense) / 6
    assert metrics["retention/after/group/commonsense"] == pytest.approx(mean)
    general = (mean + metrics["retention/after/task/mmlu"] + 0.5) / 3
    assert metrics["retention/after/accuracy"] == pytest.approx(general)
    assert metrics["average"] == pytest.approx((general + 0.5) / 2)
    head, _, before, after = Path("runs/paper/comparison.md").read_text().splitlines()
    assert head.split(" | ")[1:-1] == ["gsm8k", "mean accuracy of the tasks", "commonsense", "mbpp", "mmlu"]
    assert before.startswith("| before training | 50.0 % | ") and f" | {100 * general:.1f} % | " in after
