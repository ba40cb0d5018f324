"""Continue a prompt with the model of a checkpoint.

    python sample.py run/checkpoint.pt --prompt "The with statement"
"""

import argparse

import torch

from model import GPT, GPTConfig
import bmtrain as bmt


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--prompt", default="The ")
    parser.add_argument("--length", type=int, default=300, help="bytes to add")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--local-rank", "--local_rank", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    options = parser.parse_args()

    bmt.init_distributed(seed=options.seed)
    checkpoint = torch.load(options.checkpoint, map_location="cpu")
    model = GPT(GPTConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    model.eval()

    prompt = torch.tensor([list(options.prompt.encode())])
    tokens = model.generate(prompt, options.length, temperature=options.temperature, top_k=options.top_k)
    bmt.print_rank(bytes(tokens[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
