"""The step of `train_single.py`, taken by transformers: its Llama of the same shape, bf16 autocast over fp32 weights.

python benchmarks/train_transformers.py --batch 2 [--compile]
"""

import argparse
import statistics
import time

import torch
import transformers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    a = parser.parse_args()
    config = transformers.LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=8192,
        vocab_size=128256,
        max_position_embeddings=a.length,
        rms_norm_eps=1e-5,
        attn_implementation="sdpa",
    )
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model) if a.compile else model
    seconds = []
    for _ in range(a.warmup + a.steps):
        tokens_BS = torch.randint(0, config.vocab_size, (a.batch, a.length), device="cuda")
        begin = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = forward(input_ids=tokens_BS, labels=tokens_BS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    step = statistics.median(seconds[a.warmup :])
    name = f"transformers {transformers.__version__}{', compiled' if a.compile else ''}"
    print(
        f"| {torch.cuda.get_device_name()} | {name} | "
        f"batch {a.batch} | {a.batch * a.length / step:,.0f} tokens/s | "
        f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB |"
    )


if __name__ == "__main__":
    main()
