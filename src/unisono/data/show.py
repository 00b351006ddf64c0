"""An inspection of data on the terminal: green is learned, grey is only read."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from unisono.data.examples import Example, Inspection, Packing, Span, Token

LEARNED = ("bold #d9f99d on #14532d", "bold #d9f99d on #1d6b3a")
"""Neighbours in turn, so that one sees where tokens meet."""
READ = ("#9ca3af", "#7b828f")
SPECIAL = "italic #c084fc"
DOCUMENTS = ("#38bdf8", "#f59e0b", "#f472b6")
"""Packed documents in turn."""
PADDING = "#4b5563"
HEAD, TAIL = 220, 80
"""Tokens shown of the beginning and of the end of a long document."""
BLOCK_WIDTH = 72
EIGHTHS = "▁▂▃▄▅▆▇█"


def show(found: Inspection) -> RenderableType:
    """All of it; what is wrong with the data comes last, where it is read first."""
    parts: list[RenderableType] = [masks(found.examples), Text(), _figures(found)]
    if found.packing.first_step:
        parts += [Text(), _blocks(found.packing, found.sequence_length)]
    if found.problems:
        parts += [Text(), _problems(found)]
    parts += [Text(f"! {note}", "yellow") for note in found.notes]
    if not found.problems and not found.notes:
        parts += [Text(), Text("every record can be used", "green")]
    return Group(*parts)


def masks(examples: Sequence[Example]) -> RenderableType:
    """A panel for each example, its tokens in the colours of the legend."""
    legend = Text.assemble(
        (" learned ", LEARNED[0]), "  ", ("only read", READ[0]), "  ", ("special token", SPECIAL)
    )
    return Group(legend, *map(_example, examples))


def _example(example: Example) -> RenderableType:
    tokens, left_out = example.tokens, len(example.tokens) - HEAD - TAIL
    text = _tokens(tokens if left_out <= 0 else tokens[:HEAD])
    if left_out > 0:
        text.append(f"\n… {left_out:,} tokens …\n", "dim")
        text.append_text(_tokens(tokens[-TAIL:]))
    text.rstrip()
    return Panel(
        text,
        title=f"[bold white]{escape(example.file)}:{example.line}[/] [white]{example.kind}[/]",
        title_align="left",
        subtitle=f"[white]{example.num_learned:,} of {example.num_tokens:,} tokens learned[/]",
        subtitle_align="right",
        border_style="#4b5563",
        padding=(0, 1),
    )


def _tokens(tokens: Sequence[Token]) -> Text:
    text = Text()
    for i, token in enumerate(tokens):
        style = (LEARNED if token.learned else READ)[i % 2]
        if token.special:
            style = f"{style} {SPECIAL}"
        for line in token.text.splitlines(keepends=True) or [""]:
            body = line.rstrip("\n")
            text.append(body, style)
            if len(body) < len(line):
                text.append("↵", f"{style} dim")
                text.append("\n")
    return text


def _figures(found: Inspection) -> RenderableType:
    packing = found.packing
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    pairs = found.packing_kind == "pairs"
    kinds = f", {found.dialogues:,} of them chats or completions" if found.dialogues else ""
    if pairs:
        kinds = ", each a prompt with a chosen and a rejected answer"
    table.add_row(
        "pairs" if pairs else "documents",
        f"{found.documents:,} in {found.files:,} file{'s' if found.files > 1 else ''}{kinds}",
    )
    share = found.learned_tokens / max(found.tokens, 1)
    table.add_row("tokens", f"{found.tokens:,}, {found.learned_tokens:,} of them learned ({share:.1%})")  # fmt: skip
    table.add_row("length", f"median {packing.median_tokens:,}, longest {packing.longest_tokens:,} tokens of a document")  # fmt: skip
    table.add_row("blocks", f"{found.train_blocks:,} to train on, {found.eval_blocks:,} held out, of {found.sequence_length:,} tokens")  # fmt: skip
    filled = packing.tokens / max(packing.tokens + packing.padding_tokens, 1)
    each = packing.documents / max(packing.blocks, 1)
    table.add_row("packing", f"{found.packing_kind}: {each:.1f} documents a block, {filled:.1%} filled")  # fmt: skip
    return table


def _blocks(packing: Packing, sequence_length: int) -> RenderableType:
    """The first blocks as bars: a colour a document, solid where it is learned."""
    lines: list[RenderableType] = [
        Text.assemble(
            ("the first blocks of the run, a document a colour: ", "dim"), ("█ ", DOCUMENTS[0]), ("mostly learned  ", "dim"),
            ("▂ ", DOCUMENTS[0]), ("mostly read  ", "dim"), ("· ", PADDING), ("padding", "dim"),
        )
    ]  # fmt: skip
    lines += [Padding(_bar(spans, sequence_length), (0, 0, 0, 2)) for spans in packing.first_step]
    return Group(*lines)


def _bar(spans: Sequence[Span], sequence_length: int) -> Text:
    bar, begin = Text(no_wrap=True), 0
    for i, span in enumerate(spans):
        end = begin + span.tokens
        cells = end * BLOCK_WIDTH // sequence_length - begin * BLOCK_WIDTH // sequence_length
        share = span.learned / span.tokens
        level = EIGHTHS[min(round(share * 7), 7)]
        if span.padding:
            bar.append("·" * cells, PADDING)
        else:
            bar.append(level * cells, DOCUMENTS[i % len(DOCUMENTS)])
        begin = end
    return bar


def _problems(found: Inspection) -> RenderableType:
    """A line for each kind; and for each record, where a kind has several."""
    table = Table(box=None, pad_edge=False, header_style="bold red", padding=(0, 2, 0, 0))
    for name in ("not used", "records", "first at", "why"):
        table.add_column(name, justify="right" if name == "records" else "left")
    for problem in sorted(found.problems, key=lambda p: -p.count):
        place = _place(problem.file, problem.line)
        table.add_row(problem.kind, f"{problem.count:,}", escape(place), escape(problem.reason))
    total = sum(problem.count for problem in found.problems)
    if total == len(found.problems):
        return table
    lines = [
        Text(f"  {_place(row['file'], row['line'])}: {row['reason']}", "dim")
        for row in found.rejected
    ]
    if total > len(lines):
        lines.append(Text(f"  … {total - len(lines):,} more", "dim"))
    return Group(table, *lines)


def _place(file: str, line: int) -> str:
    return f"{file}:{line}" if line else file
