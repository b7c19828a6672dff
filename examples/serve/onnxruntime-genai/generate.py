"""Answer a prompt with the compiled graph: python generate.py "Once upon"; --check answers in short."""

import sys
from pathlib import Path

import onnxruntime_genai as og

GRAPH = Path(__file__).parents[2] / "compiled" / "onnxruntime"
MOST_TOKENS = 128


def answer(prompt: str, most: int) -> int:
    """Print the answer as it comes; return the number of its tokens."""
    model = og.Model(str(GRAPH))
    tokenizer = og.Tokenizer(model)
    stream = tokenizer.create_stream()
    tokens = tokenizer.encode(prompt)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(tokens) + most)
    generator = og.Generator(model, parameters)
    generator.append_tokens(tokens)
    count = 0
    while not generator.is_done():
        generator.generate_next_token()
        print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
        count += 1
    print()
    return count


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(0 if answer("The capital of France is", 8) else 1)
    answer(" ".join(sys.argv[1:]) or "Once upon a time", MOST_TOKENS)
