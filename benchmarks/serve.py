"""The inference engine on one GPU: throughput, latency, time to first token; random weights of published shapes.

    python benchmarks/serve.py --cases s1,s2,latency,poisson,mla,moe,transformers,step [--json FILE] [slots=512 ...]

s1: Qwen3-0.6B, 256 prompts of 100 to 1,024 tokens, as many new ones, the workload of nano-vllm's benchmark. s2:
Qwen3-8B, 256 requests of 1,024 tokens in and out. latency: one request at a time, beside the time that reading the
weights takes. poisson: requests that arrive at random, at three rates. mla, moe: part of s1 on DeepSeek-V2-Lite and
OLMoE. transformers: part of s1 by its `generate_batch`, beside the engine. step: the kernels of one step of 128
requests, and what the host does meanwhile. All are warmed up on other prompts. Temperature 0.6, no end of text.
Overrides change the engine's configuration. --tiny: small shapes, for a CPU.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from treadle.config import read_yaml, resolve
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.request import Request, Sampling, Status
from treadle.kernels.measure import machine_rates
from treadle.nn.flops import parameter_count
from treadle.nn.store import allocate, build_meta
from treadle.nn.transformer import Transformer, TransformerConfig

MODELS = Path(__file__).parent.parent / "recipes/models"
LONGEST = 4096
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Load = tuple[list[list[int]], list[int]]  # prompts, and how many new tokens each


def model(name: str, a: argparse.Namespace) -> Transformer:
    spec = read_yaml(MODELS / f"{name}.yaml")
    if a.tiny:
        spec = tiny(spec) | {"dim": 32, "vocab_size": 10_016}
    built = build_meta(resolve(TransformerConfig, spec))
    allocate(built, device=DEVICE, dtype=torch.bfloat16 if DEVICE.type == "cuda" else None)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1)
    return built


def tiny(spec: Any) -> Any:
    small = {"repeat": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "dim": 32, "experts": 4, "top_k": 2}
    small |= {"kv_rank": 16, "nope_dim": 16, "rope_dim": 16, "value_dim": 16}
    if isinstance(spec, dict):
        return {key: small.get(key, tiny(value)) for key, value in spec.items()}
    return [tiny(each) for each in spec] if isinstance(spec, list) else spec


def make_engine(name: str, a: argparse.Namespace) -> Engine:
    config = {"max_length": LONGEST} | ({"slots": 8, "budget": 256, "page": 8, "cache_tokens": 2000} if a.tiny else {})
    built = Engine(model(name, a), resolve(EngineConfig, config, a.overrides))
    begin = time.perf_counter()
    # Every number of rows that a step may have, tables of both widths, and full steps of prompts.
    prompts, _ = uniform(64 if a.tiny else 1024, 1, built.config.slots, seed=1)
    new = [1 + index // 2 for index in range(len(prompts))]
    for long in (0, len(prompts) // 8):
        run(
            built,
            ([prompt[: None if index >= len(prompts) - long else 8] for index, prompt in enumerate(prompts)], new),
        )
    print(f"{name}: warm after {time.perf_counter() - begin:.1f} s", flush=True)
    return built


def s1(a: argparse.Namespace, count: int = 256) -> Load:
    """The first requests of the workload."""
    random.seed(0)
    prompts = [[random.randint(0, 10_000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    new = [random.randint(100, 1024) for _ in range(256)]
    if a.tiny:
        prompts, new, count = [prompt[:30] for prompt in prompts], [n // 100 for n in new], 6
    return prompts[:count], new[:count]


def uniform(length: int, new: int, count: int, seed: int = 0) -> Load:
    draw = random.Random(seed)
    return [[draw.randint(0, 10_000) for _ in range(length)] for _ in range(count)], [new] * count


def run(engine: Engine, load: Load) -> float:
    """Seconds until all are done."""
    asked = [Sampling(max_tokens=new, temperature=0.6, ignore_eos=True) for new in load[1]]
    synchronize()
    begin = time.perf_counter()
    done = engine.generate(load[0], asked)
    seconds = time.perf_counter() - begin
    assert [len(request.outputs) for request in done] == load[1]
    return seconds


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def throughput(name: str, load: Callable[[argparse.Namespace], Load]) -> Callable[[argparse.Namespace], Any]:
    def case(a: argparse.Namespace) -> dict[str, Any]:
        engine, work = make_engine(name, a), load(a)
        engine.tables.forget()
        seconds = []
        for _ in range(a.repeat):
            seconds.append(run(engine, work))
            engine.tables.forget()  # or the prompts would be known
        middle, out = statistics.median(seconds), sum(work[1])
        return {
            "model": name,
            "requests": len(work[1]),
            "tokens in": sum(map(len, work[0])),
            "tokens out": out,
            "seconds": middle,
            "spread": (max(seconds) - min(seconds)) / middle,
            "tokens/s": out / middle,
        }

    return case


def latency(a: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds of a token, of one request, and of reading all weights that it needs once."""
    rate, found = machine_rates().bytes if DEVICE.type == "cuda" else float("nan"), []
    for name in ("qwen3-0.6b", "qwen3-8b"):
        engine = make_engine(name, a)
        new = 8 if a.tiny else 256
        times = [run(engine, uniform(64, new, 1, seed)) - run(engine, uniform(64, 1, 1, seed)) for seed in (2, 3, 4)]
        built = engine.model
        read = parameter_count(built) - (0 if built.config.tied else built.embedding.weight.numel())
        ms, bound = 1e3 * statistics.median(times) / (new - 1), 1e3 * read * built.head.weight.element_size() / rate
        found.append({"model": name, "ms/token": ms, "bound, ms": bound, "of the bound": bound / ms})
        del engine, built
        release()
    return found


def poisson(a: argparse.Namespace) -> list[dict[str, Any]]:
    """Requests of 100 to 1,024 tokens in and 16 to 256 out, that arrive at random moments."""
    engine, found = make_engine("qwen3-0.6b", a), []
    for rate in (20, 60, 120):
        draw, span = random.Random(rate), 0.2 if a.tiny else a.span
        moments, now = [], 0.0
        while (now := now + draw.expovariate(rate)) < span:
            moments.append(now)
        waiting = [(m, uniform(draw.randint(100, 1024) // (20 if a.tiny else 1), 1, 1, rate)[0][0]) for m in moments]
        asked = [Sampling(max_tokens=draw.randint(16, 256) // (8 if a.tiny else 1), temperature=0.6) for _ in moments]
        engine.tables.forget()
        first, between, last = list[float](), list[float](), dict[Request, float]()
        arrived: dict[Request, float] = {}
        begin, upcoming = time.perf_counter(), list(zip(waiting, asked, strict=True))[::-1]
        while upcoming or engine.busy:
            now = time.perf_counter() - begin
            while upcoming and upcoming[-1][0][0] <= now:
                (moment, prompt), sampling = upcoming.pop()
                arrived[engine.add(prompt, sampling)] = moment
            new = engine.step() if engine.busy else []
            now = time.perf_counter() - begin
            for request, _ in new:
                (between if request in last else first).append(now - last.get(request, arrived[request]))
                last[request] = now
        assert all(request.status is Status.FINISHED for request in arrived)
        found.append(
            {"requests/s": rate, "requests": len(first)} | spread("first token", first) | spread("next", between)
        )
    return found


def spread(name: str, seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {f"{name}, ms, {p:.0%}": 1e3 * ordered[int(p * (len(ordered) - 1))] for p in (0.5, 0.99)}


def peer(a: argparse.Namespace) -> list[dict[str, Any]]:
    """Part of s1 with equally many new tokens for all, by transformers' continuous batching and by the engine."""
    import transformers

    count, new = (3, 4) if a.tiny else (64, 256)
    load = s1(a, count)[0][:count], [new] * count
    engine = make_engine("qwen3-0.6b", a)
    engine.tables.forget()
    mine = run(engine, load)
    spec = engine.model.config
    del engine
    release()
    layer: Any = spec.layers[0]
    shape: dict[str, Any] = {
        "hidden_size": spec.dim,
        "num_hidden_layers": len(spec.expand()),
        "num_attention_heads": layer.mixer.heads,
        "num_key_value_heads": layer.mixer.kv_heads,
        "head_dim": layer.mixer.head_dim,
        "intermediate_size": layer.feedforward.dim,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": True,
        "attn_implementation": "sdpa",
    }
    config = transformers.Qwen3Config(**shape)
    other = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(DEVICE).eval()
    asked = transformers.GenerationConfig(max_new_tokens=new, do_sample=True, temperature=0.6, eos_token_id=-1)
    options = {"generation_config": asked, "progress_bar": False, "persistent_manager": True}
    other.generate_batch(uniform(len(load[0][0]), 1, count, seed=1)[0], **options)
    begin = time.perf_counter()
    done = other.generate_batch(load[0], **options)
    theirs = time.perf_counter() - begin
    other.destroy_cached_continuous_batching_manager()
    out = sum(len(each.generated_tokens) for each in done.values())
    who = (f"transformers {transformers.__version__}, generate_batch", out, theirs), ("treadle", count * new, mine)
    return [{"who": name, "requests": count, "tokens out": n, "seconds": s, "tokens/s": n / s} for name, n, s in who]


def step(a: argparse.Namespace) -> dict[str, Any]:
    """One step of 128 requests of about 800 tokens."""
    engine, rows = make_engine("qwen3-0.6b", a), 4 if a.tiny else 128
    prompts, _ = uniform(30 if a.tiny else 768, 1, rows, seed=5)
    requests = [engine.add(prompt, Sampling(max_tokens=100, temperature=0.6, ignore_eos=True)) for prompt in prompts]
    while any(len(request.outputs) < 4 for request in requests):
        engine.step()
    parts: dict[str, tuple[Any, str]] = {
        "schedule": (engine.scheduler, "schedule"),
        "launch": (engine.runner, "launch"),
    }
    spent = dict.fromkeys(parts, 0.0)
    for name, (owner, attribute) in parts.items():
        setattr(owner, attribute, timed(getattr(owner, attribute), name, spent))
    synchronize()
    begin = time.perf_counter()
    for _ in range(20):
        engine.step()
    synchronize()
    seconds = time.perf_counter() - begin
    found = {"rows": rows, "ms": 1e3 * seconds / 20} | {f"{name}, ms": 1e3 * each / 20 for name, each in spent.items()}
    activity = torch.profiler.ProfilerActivity.CUDA if DEVICE.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(5):
            engine.step()
        synchronize()
    sort = f"self_{DEVICE.type}_time_total"
    print(profiler.key_averages().table(sort_by=sort, row_limit=25, max_name_column_width=70), flush=True)
    for request in requests:
        engine.abort(request)
    while engine.busy:
        engine.step()
    return found


def timed(function: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*args)
        finally:
            spent[name] += time.perf_counter() - begin

    return call


def release() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


CASES: dict[str, Callable[[argparse.Namespace], Any]] = {
    "s1": throughput("qwen3-0.6b", s1),
    "s2": throughput("qwen3-8b", lambda a: uniform(32, 8, 4) if a.tiny else uniform(1024, 1024, 256)),
    "latency": latency,
    "poisson": poisson,
    "mla": throughput("deepseek-v2-lite", lambda a: s1(a, 128)),
    "moe": throughput("olmoe-1b-7b", lambda a: s1(a, 128)),
    "transformers": peer,
    "step": step,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--span", type=float, default=6.0, help="seconds in which requests of poisson arrive")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("overrides", nargs="*")
    a = parser.parse_args()
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    results: dict[str, Any] = {"device": device, "torch": torch.__version__}
    for name in a.cases.split(","):
        found = CASES[name](a)
        results[name] = found
        for row in found if isinstance(found, list) else [found]:
            cells = (
                f"{key} {value:,.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
            print(f"| {device} | {name} | " + " | ".join(cells) + " |", flush=True)
        if a.json:
            a.json.write_text(json.dumps(results, indent=1))
        release()


if __name__ == "__main__":
    main()
