"""Retrieved documents from LangChain or LlamaIndex, through the OpenAI API of a blending server.

    pip install langchain-openai llama-index-core llama-index-llms-openai-like
    python -m sglang.launch_server --model-path MODEL --enable-blend
    python examples/retrieval.py langchain --url http://localhost:30000
    python examples/retrieval.py llamaindex --url http://localhost:30000

Nothing in the chains knows of blending: whatever order the retriever gives, documents that were
seen before are reused. The retrievers stand for your own; they find by words, so that no index is
needed. Prints each answer and how many of its prompt's tokens were reused.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

FACTS = [
    "The lighthouse of Norrby was built in 1871 by Ada Lund. Its lamp burns oil from the mill, two "
    "barrels a winter, and is seen from the islands on clear nights.",
    "The mill of Norrby stands by the river Ael. It presses rapeseed oil, grinds rye for the "
    "bakers of three villages, and sells its oil in June.",
    "The river Ael freezes in January. Ships wait in the harbour of Norrby for the ice to break, "
    "often until March, and their crews live in the inn by the quay.",
    "Ada Lund was an engineer from Vik. She drew three lighthouses and one bridge over the Ael, "
    "which still carries the road from Norrby to the coast.",
]
QUESTIONS = [
    "Who built the lighthouse of Norrby?",
    "Until when do ships wait on the river Ael?",
    "Which bridge did the engineer of the lighthouse draw?",
]
#: how many documents a question gets
TOP = 3
#: what the server is told of each request beside its body; docs/requests.md
HEADERS = {"x-blend": "on"}


def found(question: str) -> list[str]:
    """The documents that share most words with the question, best first."""
    asked = {w.strip("?.").lower() for w in question.split()}
    return sorted(FACTS, key=lambda f: -len(asked & {w.strip(".,").lower() for w in f.split()}))[
        :TOP
    ]


def langchain(url: str) -> Callable[[str], tuple[str, dict[str, Any]]]:
    """A chain of retriever, prompt and model. The report is in the answer's usage."""
    from langchain_core.callbacks import CallbackManagerForRetrieverRun
    from langchain_core.documents import Document
    from langchain_core.prompts import ChatPromptTemplate
    from langchain_core.retrievers import BaseRetriever
    from langchain_core.runnables import RunnablePassthrough
    from langchain_openai import ChatOpenAI

    class ByWords(BaseRetriever):
        def _get_relevant_documents(
            self, query: str, *, run_manager: CallbackManagerForRetrieverRun
        ) -> list[Document]:
            return [Document(text) for text in found(query)]

    def together(documents: list[Document]) -> str:
        return "\n\n".join(d.page_content for d in documents)

    model = ChatOpenAI(
        base_url=f"{url}/v1",
        api_key="none",
        model="default",
        temperature=0,
        max_tokens=32,
        default_headers=HEADERS,
    )
    prompt = ChatPromptTemplate.from_messages(
        [("system", "Answer from these texts.\n\n{context}"), ("user", "{question}")]
    )
    asked = {"context": ByWords() | together, "question": RunnablePassthrough()}
    chain = asked | prompt | model

    def ask(question: str) -> tuple[str, dict[str, Any]]:
        answer = chain.invoke(question)
        return answer.text, answer.response_metadata["token_usage"]["prompt_tokens_details"]

    return ask


def llamaindex(url: str) -> Callable[[str], tuple[str, dict[str, Any]]]:
    """A query engine of retriever and synthesizer. The model's raw answers hold the report."""
    from llama_index.core import PromptTemplate, QueryBundle
    from llama_index.core.base.llms.types import ChatResponse
    from llama_index.core.query_engine import RetrieverQueryEngine
    from llama_index.core.response_synthesizers import get_response_synthesizer
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.core.schema import NodeWithScore, TextNode
    from llama_index.llms.openai_like import OpenAILike

    class ByWords(BaseRetriever):
        def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
            return [NodeWithScore(node=TextNode(text=t)) for t in found(query_bundle.query_str)]

    class Model(OpenAILike):
        """Keeps what the server says of the last request."""

        def chat(self, messages: Any, **kwargs: Any) -> ChatResponse:
            answer = super().chat(messages, **kwargs)
            usage.update(answer.raw.usage.prompt_tokens_details)
            return answer

    usage: dict[str, Any] = {}
    model = Model(
        model="default",
        api_base=f"{url}/v1",
        api_key="none",
        is_chat_model=True,
        temperature=0,
        max_tokens=32,
        context_window=8192,
        default_headers=HEADERS,
    )
    template = PromptTemplate(
        "Answer from these texts.\n\n{context_str}\n\nQuestion: {query_str}\nAnswer:"
    )
    synthesizer = get_response_synthesizer(llm=model, text_qa_template=template)
    engine = RetrieverQueryEngine(ByWords(), response_synthesizer=synthesizer)

    def ask(question: str) -> tuple[str, dict[str, Any]]:
        return str(engine.query(question)), dict(usage)

    return ask


KINDS = {"langchain": langchain, "llamaindex": llamaindex}


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("kind", choices=KINDS)
    p.add_argument("--url", default="http://localhost:30000")
    args = p.parse_args(argv)
    ask = KINDS[args.kind](args.url)
    for question in QUESTIONS:
        answer, usage = ask(question)
        print(f"{question}\n  {answer.strip()!r}\n  reused {usage['reused_tokens']} tokens")


if __name__ == "__main__":
    main()
