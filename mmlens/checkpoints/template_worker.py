"""The program that `chat_templates.render` starts: chat templates from stdin, prompts to stdout.

It is run as a file, in a Python of its own, and imports transformers' renderer without torch. Each
line is JSON: {"source": ..., "messages": [...], "variables": {...}} is answered by {"text": ...} or
{"error": ...}.
"""

from __future__ import annotations

import json
import signal
import sys

LONGEST = 1_000_000
"""Characters of a prompt."""


def limit_memory(more: int) -> None:
    """Let this process take that many bytes more than it has, where the system can say so."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as stream:
            size = int(stream.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + more, size + more))
    except (ImportError, OSError, ValueError):  # not Linux: the limit on time remains
        return


def answer(line: str) -> dict[str, str]:
    """Return the prompt, or what went wrong."""
    from transformers.utils.chat_template_utils import render_jinja_template

    asked = json.loads(line)
    try:
        (text, *_), _ = render_jinja_template(
            conversations=[asked["messages"]], chat_template=asked["source"], **asked["variables"]
        )
    except MemoryError:
        return {"error": "it takes more memory than a prompt can need"}
    except Exception as error:  # a template is a program, and raises what it likes
        said = " ".join(str(error).split())
        return {"error": f"{type(error).__name__}{said and ': ' + said}"[:LONGEST]}
    if len(text) > LONGEST:
        return {"error": f"it writes {len(text):,} characters; a prompt may have {LONGEST:,}"}
    return {"text": text}


def main() -> None:
    """Answer until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    settings = json.loads(sys.stdin.readline())
    sys.path.extend(settings["path"])
    import transformers.utils.chat_template_utils  # noqa: F401 (before memory is limited)

    limit_memory(settings["memory"])
    for line in sys.stdin:
        print(json.dumps(answer(line)), flush=True)


if __name__ == "__main__":
    main()
