"""Load a folder of a released size, with random weights, in a fresh process, and measure: not run by pytest.

    python tests/full_size.py opt-2.7b --precision bfloat16 int8

For each precision: seconds to load, the most memory while loading beyond what the libraries took before, its
bound (1.1 x what the model takes, matrices that it keeps twice included, and one shard), seconds a caption
(greedy with 20 tokens, 5 beams), and the most memory of it all. Peaks are the kernel's own: VmHWM counts
mapped files too, RssAnon (looked at 200 times a second) what cannot be dropped. `--whole` loads as
transformers does by itself, from mapped files.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def status(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}: this measurement needs Linux")


class Anonymous(threading.Thread):
    """Watches the memory that no file backs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.ended = 0, threading.Event()
        self.start()

    def run(self) -> None:
        """Look until told to end."""
        while not self.ended.wait(0.005):
            self.most = max(self.most, status("RssAnon"))

    def end(self) -> int:
        """The most there was."""
        self.ended.set()
        self.join()
        return max(self.most, status("RssAnon"))


def measure(folder: Path, precision: str, options: argparse.Namespace) -> dict:
    """In this process: load, caption, and tell."""
    import torch
    import transformers

    from blip2 import checkpoint, load
    from blip2.generation import Generation, generate
    from blip2.packed import PackedLinear

    torch.set_num_threads(options.threads)
    if precision in ("int8", "nf4"):
        import bitsandbytes  # noqa: F401
    if options.whole:  # as if transformers had been given the folder
        real = checkpoint.Blip2.from_pretrained.__func__

        def mapped(cls, source, *, state_dict, **more):
            return real(cls, folder, **more)

        checkpoint.Blip2.from_pretrained = classmethod(mapped)
    transformers.utils.logging.disable_progress_bar()
    torch.ones(8, 8) @ torch.ones(8, 8)
    before, before_anonymous = status("VmRSS"), status("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    watch = Anonymous()
    began = time.perf_counter()
    loaded = load(folder, precision=precision, device="cpu", check_memory=not options.whole)
    seconds = time.perf_counter() - began
    peak, anonymous = status("VmHWM") - before, watch.end() - before_anonymous
    model = loaded.model
    final = sum(parameter.nbytes for parameter in model.parameters())  # a state dict would undo packing
    packed = {id(layer.product): layer for layer in model.modules() if isinstance(layer, PackedLinear)}
    for layer in packed.values():
        blocks = layer.product.blocks
        if blocks is not None and layer.weight.stride() != (0, 0):  # it is kept in rows, too
            final += blocks.numel() * blocks.element_size()
    shard = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    facts = {
        "precision": loaded.precision, "load_s": seconds, "final_gb": final / 1e9, "shard_gb": shard / 1e9,
        "bound_gb": (1.1 * final + shard) / 1e9, "peak_gb": peak / 1e9, "anonymous_gb": anonymous / 1e9,
        "within": peak <= 1.1 * final + shard,
    }  # fmt: skip
    if not options.captions:
        return facts
    pixels = torch.rand(1, 3, loaded.processor.image_size, loaded.processor.image_size)
    pixels = pixels.to(model.dtype)
    for name, method in (("greedy_s", "greedy"), ("beam5_s", "beam")):
        took = []
        settings = Generation(method, max_new_tokens=20, min_new_tokens=20)
        for _ in range(1 + options.captions):
            began = time.perf_counter()
            generate(model, loaded.processor, model.encode_image(pixels), "", settings)
            took.append(time.perf_counter() - began)
        facts[name] = sorted(took[1:])[len(took[1:]) // 2]
    return facts | {"rss_peak_gb": status("VmHWM") / 1e9}


def main() -> None:
    """Write the folder, and measure each precision in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", help="such as mid, opt-2.7b or flan-t5-xxl")
    parser.add_argument("--precision", nargs="+", default=["bfloat16", "int8"])
    parser.add_argument("--depth", type=int, help="layers, at full width; default: all")
    parser.add_argument("--dtype", default="float16", help="of the folder (float16)")
    parser.add_argument("--shard", default="5GB", help="largest weight file (5GB)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--captions", type=int, default=1, help="measured, after one to warm up (1)")
    parser.add_argument("--folder", type=Path, help="where it is, or is written (and removed)")
    parser.add_argument("--whole", action="store_true", help="let transformers map the files")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.folder, options.precision[0], options)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / options.size
        if not folder.exists():
            from blip2.bench.folders import make_folder

            make_folder(
                options.size, folder, options.dtype, max_shard_size=options.shard, depth=options.depth
            )
        environment = os.environ | {
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "passive",
            "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        for precision in options.precision:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", "--folder", str(folder)]
            done = subprocess.run(
                [*command, "--precision", precision],
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                check=True,
            )
            facts = json.loads(done.stdout.splitlines()[-1])
            print(
                json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in facts.items()}),
                flush=True,
            )


if __name__ == "__main__":
    main()
