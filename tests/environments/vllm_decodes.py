"""Run by vLLM's own python: `python vllm_decodes.py JOBS.json` prints what it decodes, as one line of JSON.

A job is {"directory": …, "prompts": [[…], …], "count": n, "speculative_config": {…} or null}; its answer is {"tokens":
[[…], …], "margins": [[…], …], "accepted": n, "drafts": n, "by_position": [n, …]}. A margin is by how much, in nats, the
chosen token was likelier than the next; drafts are steps that drafted, of which by_position kept the token at each
position. All jobs share one process, because importing vLLM takes longer than any of them.
"""

import gc
import json
import os
import sys
from pathlib import Path

OWN = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


def decode(job):
    from vllm import LLM, SamplingParams  # reads the environment when it is imported

    model = LLM(
        model=job["directory"],
        enforce_eager=True,
        max_model_len=job.get("context", 256),
        max_num_seqs=4,
        speculative_config=job["speculative_config"],
        enable_prefix_caching=False,
        generation_config="vllm",
        disable_log_stats=False,
        seed=0,
    )
    settings = SamplingParams(temperature=0, max_tokens=job["count"], ignore_eos=True, logprobs=2)
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    answers = [answer.outputs[0] for answer in model.generate(prompts, settings)]
    counters = {each.name: getattr(each, "value", getattr(each, "values", 0)) for each in model.get_metrics()}
    margins = []
    for answer in answers:
        best = [sorted((each.logprob for each in step.values()), reverse=True) for step in answer.logprobs]
        margins.append([found[0] - found[1] for found in best])
    return {
        "tokens": [list(answer.token_ids) for answer in answers],
        "margins": margins,
        "accepted": counters.get("vllm:spec_decode_num_accepted_tokens", 0),
        "drafts": counters.get("vllm:spec_decode_num_drafts", 0),
        "by_position": counters.get("vllm:spec_decode_num_accepted_tokens_per_pos", []),
    }


if __name__ == "__main__":
    os.environ |= OWN
    from vllm.distributed import cleanup_dist_env_and_memory

    found = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        try:
            found.append(decode(job))
        except Exception as error:  # noqa: BLE001 - the other jobs have something to say, too
            found.append({"error": f"{type(error).__name__}: {error}"})
        gc.collect()
        cleanup_dist_env_and_memory()  # a model with experts finds no group for them where one without was first
    print("\n" + json.dumps(found))
