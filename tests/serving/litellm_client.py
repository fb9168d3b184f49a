"""What an unmodified litellm gets from a server; run by tests.serving.clients under an interpreter that has it:

litellm_client.py URL MODEL
"""

import asyncio
import sys

import litellm


def main(url: str, model: str) -> None:
    asked = {
        "model": f"hosted_vllm/{model}",
        "api_base": f"{url}/v1",
        "api_key": "none",
        "max_tokens": 8,
        "temperature": 0,
        "messages": [{"role": "user", "content": "what is the wind?"}],
    }
    done = litellm.completion(**asked)
    text = done.choices[0].message.content
    assert text and done.usage.completion_tokens == 8, done
    parts = [part.choices[0].delta.content or "" for part in litellm.completion(stream=True, **asked)]
    assert "".join(parts) == text, (parts, text)
    assert asyncio.run(litellm.acompletion(**asked)).choices[0].message.content == text
    thinking = litellm.completion(extra_body={"chat_template_kwargs": {"thinking": True}}, **asked)
    message = thinking.choices[0].message
    assert message.reasoning_content and not message.content, message
    words = litellm.text_completion(
        model=f"text-completion-openai/{model}",
        api_base=f"{url}/v1",
        api_key="none",
        prompt="the keys",
        max_tokens=8,
        temperature=0,
    )
    assert words.choices[0].text, words
    try:
        litellm.completion(**asked | {"temperature": -1})
    except litellm.BadRequestError as error:
        assert "temperature" in str(error)
    else:
        raise AssertionError("a negative temperature was taken")


if __name__ == "__main__":
    main(*sys.argv[1:])
