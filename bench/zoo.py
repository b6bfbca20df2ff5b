"""Networks that other people wrote: what can be cut out of them, what stays and why, and whether a cut is exact.

    python bench/zoo.py                          # all networks into bench/records/zoo.jsonl, then docs/zoo.md
    python bench/zoo.py --only timm:levit_128s   # one of them, again
    python bench/zoo.py --table                  # docs/zoo.md from the record

Needs torchvision, timm and transformers (`--path FOLDER` adds a folder to look for them in). For each network, in
float64 and with random numbers in all norms: find its classes of channels; kill a random 30 % of every class, by
zeroing what makes them or what reads them; find the dead, cut them, and compare the outputs before and after, in eval
and in train mode; take a step of the optimizer; load the cut state dict into a fresh network that is made as small.

Weights are entries of parameters with two or more axes. A weight counts as removable if a class of channels owns its
row or its column. Times are processor time of one thread.
"""

import json
import re
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import analysis_time
from selfcompress.axes import Axes, find_axes
from selfcompress.copies import tensors_in
from selfcompress.scoring import describe_machine, describe_versions
from selfcompress.shrinking import Kept, apply_plan, find_dead, resize
from selfcompress.trial import tried

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "bench" / "records" / "zoo.jsonl"
PAGE = ROOT / "docs" / "zoo.md"

TORCHVISION = (
    "alexnet", "vgg11_bn", "squeezenet1_1", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121",
    "googlenet", "inception_v3", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5", "efficientnet_b0",
    "efficientnet_v2_s", "regnet_y_400mf", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "convnext_tiny", "vit_b_16",
    "swin_t", "swin_v2_t", "maxvit_t",
)  # fmt: skip
TIMM = (
    "resnetv2_50", "resnest14d", "res2net50_26w_4s", "ghostnet_100", "hrnet_w18_small", "dla34", "cspresnet50",
    "ese_vovnet39b", "repvgg_a0", "nfnet_l0", "mobilenetv4_conv_small", "edgenext_xx_small", "poolformer_s12",
    "fastvit_t8", "mixer_s32_224", "resmlp_12_224", "gmlp_s16_224", "vit_tiny_patch16_224",
    "deit3_small_patch16_224", "swin_tiny_patch4_window7_224", "cait_xxs24_224", "xcit_nano_12_p16_224",
    "levit_128s", "mobilevit_xxs", "coatnet_nano_rw_224", "efficientformerv2_s0", "eva02_tiny_patch14_224",
    "volo_d1_224", "pit_ti_224", "beit_base_patch16_224",
)  # fmt: skip
TRANSFORMERS = ("bert", "gpt2", "llama", "qwen2", "vit", "t5", "whisper", "distilbert")
NAMES = (
    *(f"torchvision:{n}" for n in TORCHVISION),
    *(f"timm:{n}" for n in TIMM),
    *(f"transformers:{n}" for n in TRANSFORMERS),
)
Inputs = tuple[Tensor, ...]


class Adapted(nn.Module):
    """A network of transformers with positional arguments and the interesting tensor as its output."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.names = names

    def forward(self, *inputs: Tensor) -> Any:
        """Run it without caches."""
        cache = {} if "pixel_values" in self.names else {"use_cache": False}
        out = self.network(**dict(zip(self.names, inputs, strict=True)), **cache)
        return out.logits if hasattr(out, "logits") else out.last_hidden_state


def from_transformers(name: str) -> tuple[nn.Module, Inputs]:
    import transformers as tf

    tokens = torch.randint(0, 60, (2, 12))
    small: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    wide: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, **small}
    if name == "bert":
        return Adapted(
            tf.BertModel(
                tf.BertConfig(
                    num_attention_heads=4, max_position_embeddings=32, attention_probs_dropout_prob=0.0, **wide
                )
            ),
            ("input_ids",),
        ), (tokens,)
    if name == "distilbert":
        config = tf.DistilBertConfig(
            dim=64, hidden_dim=128, n_layers=2, n_heads=4, max_position_embeddings=32, attention_dropout=0.0, **small
        )
        return Adapted(tf.DistilBertModel(config), ("input_ids",)), (tokens,)
    if name == "gpt2":
        config = tf.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=32, attn_pdrop=0.0, **small)
        return Adapted(tf.GPT2LMHeadModel(config), ("input_ids",)), (tokens,)
    if name == "llama":  # grouped queries: 4 groups of 2
        config = tf.LlamaConfig(num_attention_heads=8, num_key_value_heads=4, **wide)
        return Adapted(tf.LlamaForCausalLM(config), ("input_ids",)), (tokens,)
    if name == "qwen2":  # grouped queries: 2 groups of 7
        config = tf.Qwen2Config(num_attention_heads=14, num_key_value_heads=2, **{**wide, "hidden_size": 112})
        return Adapted(tf.Qwen2ForCausalLM(config), ("input_ids",)), (tokens,)
    if name == "vit":
        del wide["vocab_size"]
        config = tf.ViTConfig(num_attention_heads=4, image_size=32, patch_size=8, **wide)
        return Adapted(tf.ViTForImageClassification(config), ("pixel_values",)), (torch.randn(2, 3, 32, 32),)
    if name == "t5":
        config = tf.T5Config(
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            dropout_rate=0.0,
            **small,
        )
        return Adapted(tf.T5Model(config), ("input_ids", "decoder_input_ids")), (tokens, tokens[:, :7])
    config = tf.WhisperConfig(
        d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=16, max_source_positions=20, max_target_positions=20,
        decoder_start_token_id=1, **small,
    )  # fmt: skip
    features = torch.randn(2, 16, 40)
    return Adapted(tf.WhisperModel(config), ("input_features", "decoder_input_ids")), (features, tokens[:, :7])


def build(name: str) -> tuple[nn.Module, Inputs]:
    """A network with random weights, and an input for it."""
    source, _, network = name.partition(":")
    if source == "transformers":
        return from_transformers(network)
    if source == "torchvision":
        import torchvision

        options = {"init_weights": False} if network in ("googlenet", "inception_v3") else {}
        size = 299 if network == "inception_v3" else 224
        return torchvision.models.get_model(network, weights=None, **options), (torch.randn(2, 3, size, size),)
    import timm

    model = timm.create_model(network, pretrained=False)
    return model, (torch.randn(2, *model.default_cfg["input_size"]),)


def as_double(inputs: Inputs) -> Inputs:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Random numbers where a fresh network has zeros and ones, so that nothing is equal by chance."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point():
            continue
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
        elif isinstance(tensor, nn.Parameter) and tensor.numel() and bool((tensor == tensor.flatten()[0]).all()):
            tensor.add_(torch.randn_like(tensor) * 0.1)


def removable(model: nn.Module, axes: Axes) -> tuple[int, float, list[tuple[str, float]]]:
    """Weights, the share of them in classes that can be cut, and reasons for the rest with their shares."""
    covered: dict[str, dict[int, set[int]]] = {}
    for c in axes.classes:
        for slot in c.slots:
            covered.setdefault(slot.tensor, {}).setdefault(slot.axis, set()).update(i for m in slot.indices for i in m)
    reasons: dict[str, str] = {}
    for f in axes.frozen:
        reasons.setdefault(f.tensor, f.reason)
    total = inside = 0.0
    why: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        stays = 1.0
        for axis, indices in covered.get(name, {}).items():
            stays *= 1 - len(indices) / parameter.shape[axis]
        total += parameter.numel()
        inside += parameter.numel() * (1 - stays)
        if stays:
            reason = reasons.get(name, "is not read by an operator with a rule")
            reason = re.sub(r", /\S*/([^/\s]+:\d+\))", r", \1", reason)  # the file's name will do
            why[reason] = why.get(reason, 0.0) + parameter.numel() * stays
    return (
        int(total),
        inside / total,
        [(reason, n / total) for reason, n in sorted(why.items(), key=lambda item: -item[1])[:3]],
    )


@torch.no_grad()
def kill(model: nn.Module, axes: Axes, share: float, rng: np.random.Generator) -> list[set[int]]:
    """Zero what makes, or what reads, a random share of the members of every class; returns who that is."""
    tensors = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    victims = []
    for c in axes.classes:
        count = min(max(1, round(share * c.size)), c.size - c.least)
        chosen = [int(i) for i in rng.choice(c.size, count, replace=False)]
        silent = [s for s in c.slots if s.roles & {"produces", "adds", "mean"}]
        unread = [] if c.contracted else list(c.having("reads"))
        for slot in unread if c.noise or (unread and rng.random() < 0.5) else silent:
            index = [i for m in chosen for i in slot.indices[m]]
            tensors[slot.tensor][(slice(None),) * slot.axis + (index,)] = 0
        victims.append(set() if c.noise and not unread else set(chosen))
    return victims


class InDouble(TorchFunctionMode):
    """Within it, what code brings to single precision to be exact, as norms of language models do, stays in double."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "float" or (name == "to" and torch.float32 in args):
            return args[0] if args[0].dtype == torch.float64 else func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def run(model: nn.Module, inputs: Inputs, training: bool) -> list[Tensor]:
    """All that the network returns; dropout is off, and whatever else is random starts alike."""
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    torch.manual_seed(1)
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    # dropout that is called as a function draws as many numbers as there are channels
    with torch.no_grad(), mock.patch.object(F, "dropout", lambda x, *args, **kwargs: x), InDouble():
        found = [t.clone() for t in tensors_in(model(*inputs)) if t.is_floating_point()]
        for name, buffer in model.named_buffers():  # a run in train mode moves the running statistics
            buffer.copy_(state[name])
    return found


def difference(before: list[Tensor], after: list[Tensor]) -> float:
    """Largest difference, relative to the largest number."""
    if [t.shape for t in before] != [t.shape for t in after]:
        return float("inf")
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in zip(before, after, strict=True))


def examine(name: str) -> dict[str, Any]:
    """Analyse one network and try a cut on it."""
    torch.manual_seed(0)
    model, inputs = build(name)
    start = time.process_time()
    axes = tried(model, inputs, find_axes(model, inputs))
    seconds = time.process_time() - start
    weights, share, why = removable(model, axes)
    model.double()
    inputs = as_double(inputs)
    shake(model)
    victims = kill(model, axes, 0.3, np.random.default_rng(0))
    kept = Kept.full(axes)
    plan = find_dead(model, axes, kept)
    found = {r.index: set(r.members) for r in plan.removals}
    missed = sum(len(v - found.get(i, set())) for i, v in enumerate(victims))
    before = {training: run(model, inputs, training) for training in (False, True)}
    entries = sum(p.numel() for p in model.parameters())
    kept = apply_plan(plan, model, axes, kept)
    errors = {training: difference(before[training], run(model, inputs, training)) for training in (False, True)}
    left = sum(p.numel() for p in model.parameters())
    fresh = build(name)[0].double()
    resize(fresh, axes, kept)
    fresh.load_state_dict(model.state_dict())
    reloaded = difference(run(model, inputs, False), run(fresh, inputs, False))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    sum(t.square().mean() for t in tensors_in(model.train()(*inputs)) if t.is_floating_point()).backward()  # type: ignore[union-attr]
    optimizer.step()
    return {
        "network": name,
        "weights": weights,
        "removable": share,
        "stays": why,
        "classes": len(axes.classes),
        "seconds": seconds,
        "parameters_left": left / entries,
        "not_found_dead": missed,
        "error_eval": errors[False],
        "error_train": errors[True],
        "error_reloaded": reloaded,
    }


def page(records: list[dict[str, Any]]) -> str:
    lines = [
        "# Networks that other people wrote",
        "",
        "Made by `python bench/zoo.py`; the record is `bench/records/zoo.jsonl`. Nothing in these networks was edited.",
        "",
        "Removable: share of the weights (parameters with two or more axes) whose row or column belongs to a class of",
        "channels that can be cut. Error: largest difference of an output, relative to the largest output, after a",
        "random 30 % of every class was killed and cut, in float64, the largest of eval mode, train mode, and a fresh",
        "network that was made as small and loaded. Seconds: processor time of the whole analysis, one thread.",
        "",
        "| network | weights | removable | classes | seconds | error after a cut | what stays, and why |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in records:
        if "failure" in r:
            lines.append(f"| {r['network']} | | | | | failed | {r['failure']} |")
            continue
        error = max(r["error_eval"], r["error_train"], r["error_reloaded"])
        why = "; ".join(f"{share:.1%}: {reason}" for reason, share in r["stays"][:2] if share >= 0.005)
        lines.append(
            f"| {r['network']} | {r['weights']:,} | {r['removable']:.1%} | {r['classes']} | {r['seconds']:.1f} "
            f"| {error:.0e} | {why.replace('|', '/')} |"
        )
    if analysis_time.RECORD.exists():
        lines += [
            "",
            "How the time grows, by `python bench/analysis_time.py` (`bench/records/analysis_time.json`):",
            "",
            *analysis_time.lines(json.loads(analysis_time.RECORD.read_text())),
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = analysis_time.parser_of(__doc__)
    parser.add_argument("--only", nargs="*", default=NAMES, help="names such as timm:levit_128s")
    parser.add_argument("--table", action="store_true", help="only write the page")
    args = parser.parse_args()
    analysis_time.prepare(args)
    records = [json.loads(line) for line in RECORD.read_text().splitlines()] if RECORD.exists() else []
    known = {r["network"]: r for r in records}
    action: Callable[[str], dict[str, Any]] = examine
    for name in () if args.table else args.only:
        if name in known and args.only is NAMES:
            continue
        try:
            record = action(name)
        except Exception as error:
            traceback.print_exc()
            record = {
                "network": name,
                "failure": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            }
        print(json.dumps(record), flush=True)
        known[name] = {**record, "machine": describe_machine(), "versions": describe_versions()}
        order = [known[n] for n in NAMES if n in known]
        RECORD.parent.mkdir(exist_ok=True)
        RECORD.write_text("".join(json.dumps(r) + "\n" for r in order))
    PAGE.write_text(page([known[n] for n in NAMES if n in known]))


if __name__ == "__main__":
    main()
