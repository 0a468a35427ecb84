"""The engine's limit: PyTorch's forward pass and log-softmax of the same sequences on all cores, and nothing else.

Each line on stdin scores once; the answer is the seconds and a sum for each sequence.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch
import transformers

from benchmarks.service import work

BATCH = 8  # sequences of one pass: the logits of more of them would not stay in the caches


def main() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, local_files_only=True)
    model.eval()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        sequences = work.sequences(request["count"], vocab_size=model.config.vocab_size)
        begin, sums = time.perf_counter(), []
        with torch.inference_mode():
            for start in range(0, len(sequences), BATCH):
                batch = sequences[start : start + BATCH]
                tokens_BS = torch.tensor([s.token_ids.tolist() for s in batch])
                logprobs_BTV = model(tokens_BS, use_cache=False).logits[:, :-1].log_softmax(-1)
                logprobs_BT = logprobs_BTV.gather(-1, tokens_BS[:, 1:, None])[..., 0]
                for sequence, logprobs_T in zip(batch, logprobs_BT, strict=True):
                    sums.append(float(logprobs_T[sequence.scored_positions() - 1].sum()))
        print(json.dumps({"seconds": time.perf_counter() - begin, "sums": sums}), flush=True)


if __name__ == "__main__":
    main()
