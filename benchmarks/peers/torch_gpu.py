"""What PyTorch and the GPU themselves reach: the figures that a CUDA device of tinyres has to be measured against.

    python benchmarks/peers/torch_gpu.py --json FILE [--depths 20 56 110] [--batch-size 128]

Limits of the device: copy bandwidth by size, matrix products by precision, the cost of an empty kernel. Then the
training step of the ResNets, by depth those of CIFAR or of ImageNet (forward, loss, backward, SGD with momentum and
decay), in float32, TF32 and bfloat16 (autocast), each eager, compiled, and both again with the whole step captured in
one CUDA graph. A combination that fails is recorded with its reason.
"""

import argparse
import datetime
import json
import pathlib
import statistics
import time

import torch
from torch.nn import functional as F
from torch_resnet import CifarResNet, ImageNetResNet

BATCHES = 8
IMAGENET = (18, 34, 50, 101, 152)  # depths


def milliseconds(call, rounds=15, seconds=0.15):
    """Median ms of call() over rounds, each a run of calls of about `seconds` between two events."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    count = max(1, min(2000, int(seconds / (time.perf_counter() - began))))
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(count):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / count)
    return statistics.median(times)


def graph_of(call, warm_up=5):
    """call() captured once, as a function that replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def use_precision(precision):
    """float32 means float32: TF32 only where it is asked for."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def limits():
    copies = {}
    for mebibytes in (1, 4, 8, 16, 32, 64, 256, 2048):
        a = torch.zeros(mebibytes << 18, device="cuda")
        b = torch.empty_like(a)
        call = graph_of(lambda a=a, b=b: [b.copy_(a) for _ in range(10)])
        copies[str(mebibytes)] = round(10 * 2 * (mebibytes << 20) / milliseconds(call) / 1e6, 1)
    products = {}
    for precision, dtype in (("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)):
        use_precision(precision)
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        products[precision] = round(2 * 8192**3 / milliseconds(lambda a=a, b=b: a @ b, rounds=5) / 1e9, 1)
    one = torch.zeros(1, device="cuda")
    small = {
        "eager_us": round(1e3 * milliseconds(lambda: one.add_(1)), 2),
        "graph_us": round(1e3 * milliseconds(graph_of(lambda: [one.add_(1) for _ in range(1000)])) / 1000, 2),
    }
    return {"copy_gbs_by_mib": copies, "matmul_8192_tflops": products, "one_element_kernel": small}


def training_step(depth, batch_size, precision, mode):
    """ms of a step, peak MiB, and the loss at the end."""
    torch.manual_seed(0)
    torch.compiler.reset()
    use_precision(precision)
    torch.backends.cudnn.benchmark = True
    network, size, classes = (ImageNetResNet, 224, 1000) if depth in IMAGENET else (CifarResNet, 32, 10)
    model = network(depth).cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, fused=True)
    images = torch.randn(BATCHES, batch_size, 3, size, size, device="cuda")
    labels = torch.randint(0, classes, (BATCHES, batch_size), device="cuda")
    x = images[0].contiguous(memory_format=torch.channels_last)
    t = labels[0].clone()

    def forward(x, t):
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
            logits = model(x)
        return F.cross_entropy(logits.float(), t)

    if mode.startswith("compile"):
        forward = torch.compile(forward)
    loss = torch.zeros((), device="cuda")

    def step():
        optimizer.zero_grad()
        result = forward(x, t)
        result.backward()
        optimizer.step()
        loss.copy_(result.detach())

    run = graph_of(step) if mode.endswith("graph") else step
    turn = iter(range(1 << 60))

    def fresh_step():
        i = next(turn) % BATCHES
        x.copy_(images[i])
        t.copy_(labels[i])
        run()

    torch.cuda.reset_peak_memory_stats()
    ms = milliseconds(fresh_step)
    if not torch.isfinite(loss).item():
        raise ArithmeticError(f"the loss is {loss.item()}")
    peak = torch.cuda.max_memory_reserved() >> 20
    rate = round(1e3 * batch_size / ms)
    return {"ms": round(ms, 4), "images_per_second": rate, "peak_mib": peak, "loss": loss.item()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56, 110])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--json", metavar="FILE", required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch_gpu: PyTorch sees no GPU here")

    properties = torch.cuda.get_device_properties(0)
    result = {
        "benchmark": "torch_gpu",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
        "batch_size": args.batch_size,
        "limits": limits(),
        "steps": [],
    }
    print(json.dumps(result["limits"]))

    def save():
        pathlib.Path(args.json).write_text(json.dumps(result, indent=2) + "\n")

    save()
    # Compiling takes a minute a network: what needs none comes first, so that a time limit cuts the least
    for modes in (("eager", "graph"), ("compile", "compile+graph")):
        for depth in args.depths:
            for precision in ("fp32", "tf32", "bf16"):
                for mode in modes:
                    row = {"depth": depth, "precision": precision, "mode": mode}
                    try:
                        row.update(training_step(depth, args.batch_size, precision, mode))
                    except Exception as error:  # noqa: BLE001 - one combination must not cost the others
                        row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
                    result["steps"].append(row)
                    save()
                    print(json.dumps(row), flush=True)
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
