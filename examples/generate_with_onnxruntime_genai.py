"""Answer a question from a compiled directory with onnxruntime-genai alone: nothing of optikit is imported.

pip install onnxruntime-genai
python generate_with_onnxruntime_genai.py out/compiled/onnxruntime "What is the capital of France?"
"""

import argparse
import json
import time

import onnxruntime_genai as genai


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer a question with onnxruntime-genai.")
    parser.add_argument("directory", help="what `optikit run` wrote to compiled/onnxruntime")
    parser.add_argument("question", nargs="?", default="What is the capital of France?")
    parser.add_argument("--max-tokens", type=int, default=128)
    arguments = parser.parse_args()

    model = genai.Model(arguments.directory)
    tokenizer = genai.Tokenizer(model)
    turns = json.dumps([{"role": "user", "content": arguments.question}])
    prompt = tokenizer.encode(tokenizer.apply_chat_template(turns, add_generation_prompt=True))

    settings = genai.GeneratorParams(model)
    settings.set_search_options(do_sample=False, max_length=len(prompt) + arguments.max_tokens)
    generator = genai.Generator(model, settings)
    generator.append_tokens(prompt)

    stream = tokenizer.create_stream()
    times = []
    while not generator.is_done():
        generator.generate_next_token()
        times.append(time.perf_counter())
        print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
    print()
    if len(times) > 1:
        print(f"{(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s after the first", flush=True)


if __name__ == "__main__":
    main()
