"""Chat templates that know tools, in the manner of today's models but written anew; shared by the tests of several turns."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import tokenizer

#: Tool calls in tags of their own, results in user turns, reasoning written after the last user turn only.
QWEN = (
    "{% if tools %}<|im_start|>system\nTools:{% for t in tools %}\n{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(user=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.user = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}{{ '\n<result>\n' + m.content }}\n</result>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.user and (loop.last or m.reasoning_content) %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
    "{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '\n' if m.content or not loop.first else '' }}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n'
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: One call in a turn, without tags; a header for results, which are JSON.
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ 'ipython' if m.role == 'tool' else m.role }}<|/head|>\n\n"
    "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% elif m.role == 'tool' %}{{ m.content | tojson }}{% elif m.role == 'user' and loop.first and tools %}"
    "Functions: {{ tools | tojson }}\n\n{{ m.content | trim }}{% else %}{{ m.content | trim }}{% endif %}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
#: No generation prompt; tools before the last user turn; what alternates leaves turns that call tools out.
MISTRAL = (
    "{% set ns = namespace(n=0, user=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.user = loop.index0 %}"
    "{% endif %}{% if m.role == 'user' or (m.role == 'assistant' and m.tool_calls is not defined) %}"
    "{% if (m.role == 'user') != (ns.n % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{% endif %}{% endfor %}{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and loop.index0 == ns.user %}[TOOLS] {{ tools | tojson }}[/TOOLS]{% endif %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[RESULTS] {\"content\": {{ m.content | tojson }}}[/RESULTS]"
    "{% elif m.tool_calls is defined %}[CALLS] [{% for c in m.tool_calls %}{{ c.function | tojson }}{{ '' if loop.last else ', ' }}"
    "{% endfor %}]{{ eos_token }}{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
#: The assistant says where its turn goes before it says anything; the last turn ends with a token of its own, and so do calls.
GPT_OSS = (
    "{% for m in messages %}{% if m.tool_calls %}<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}"
    "<|channel|>commentary<|message|>{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% elif m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% elif m.role == 'tool' %}<|start|>functions<|message|>{{ m.content }}<|end|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
#: Knows neither tools nor their results, and says nothing of it.
NO_TOOLS = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL_TEMPLATES = {"qwen": QWEN, "llama": LLAMA, "mistral": MISTRAL, "gpt_oss": GPT_OSS, "no_tools": NO_TOOLS}
CONTROL = [
    *(
        "<|head|>",
        "<|/head|>",
        "<|eot|>",
        "[INST]",
        "[/INST]",
        "[CALLS]",
        "[RESULTS]",
        "[/RESULTS]",
        "[TOOLS]",
        "[/TOOLS]",
    ),
    *("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>", "<|return|>"),
]
#: Tokens that are added but not special, as Qwen's: they end no turn.
TAGS = ["<tool_call>", "</tool_call>", "<result>", "</result>", "<think>", "</think>"]
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"word": "string"}}}]


def tool_tokenizer(template):
    """Of tests/tiny.py, with every template's control tokens; ``template`` names one or is one."""
    made = tokenizer(TOOL_TEMPLATES.get(template, template), 300)
    made.add_special_tokens({"additional_special_tokens": CONTROL})
    made.add_tokens(TAGS)
    return made


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(word, text=None, **more):
    function = {"name": "look_up", "arguments": {"word": word}}
    content = {} if text is None else {"content": text}
    return {"role": "assistant", **content, "tool_calls": [{"type": "function", "function": function}], **more}


def result(text):
    return {"role": "tool", "name": "look_up", "content": text}


#: Three turns of the assistant's, two of them tool calls.
PROMPT = [user("red or blue?")]
CHOSEN = [call("red"), result('red is "slow"'), call("blue"), result("blue is fast"), assistant("blue")]
REJECTED = "no"


def rows(count=12):
    """Rows of three kinds: tool calls and results, several turns of text, one call alone."""
    made = []
    for i in range(count):
        kind = i % 3
        chosen = [CHOSEN, [assistant("maybe"), user(f"why {i}?"), assistant("one two")], [call("red")]][kind]
        again = [assistant("no no"), user("why?"), assistant("no")]
        rejected = [[assistant("no")], [assistant("no"), user("why?"), assistant("three")], again][kind]
        made.append({"prompt": [user(f"{i} red or blue?")], "chosen": chosen, "rejected": rejected, "tools": TOOLS})
    return made


def write_tool_models(root: Path) -> dict[str, str]:
    """{template: folder} of three tiny models of three architectures and templates."""
    folders = {}
    for seed, (template, kind) in enumerate({"qwen": "llama", "llama": "qwen2", "mistral": "gpt_neox"}.items()):
        made = tool_tokenizer(template)
        sizes = {
            "vocab_size": len(made),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.15)
        model.save_pretrained(root / template)
        made.save_pretrained(root / template)
        folders[template] = str(root / template)
    return folders


def logps_by_hand(folder: str, row: dict) -> list[list[float]]:
    """[side, (log-prob, tokens)] of a row by a plain forward in float64 over the template's own rendering: of each token that ends
    within the assistant's turns, whose text is found here by cutting the rendering at the template's control words."""
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    opening, ending = HEADERS[Path(folder).name]
    sides = []
    for side in ("chosen", "rejected"):
        text = tok.apply_chat_template([*row["prompt"], *row[side]], tools=row["tools"], tokenize=False)
        spans, at = [], text.index(row["prompt"][0]["content"])
        while (start := min((i for word in opening if (i := text.find(word, at)) >= 0), default=-1)) >= 0:
            word = next(word for word in opening if text.startswith(word, start))
            start += len(word)
            at = text.index(ending, start) + len(ending)
            spans.append((start, at))
        encoded = tok(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor(encoded["input_ids"])
        kept = [
            i
            for i, (a, b) in enumerate(encoded["offset_mapping"])
            if any(a < end and b > start for start, end in spans)
        ]
        with torch.no_grad():
            logps = model(ids[None]).logits[0].log_softmax(-1)
        sides.append([sum(logps[i - 1, ids[i]].item() for i in kept), len(kept)])
    return sides


#: What stands before what the assistant writes, and how it ends.
HEADERS = {
    "qwen": (["<|im_start|>assistant\n"], "<|im_end|>"),
    "llama": (["<|head|>assistant<|/head|>\n\n"], "<|eot|>"),
    "mistral": (["[/INST]", "[/RESULTS]"], "</s>"),
}
