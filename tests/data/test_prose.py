from __future__ import annotations

import gc

import pytest

from unmix.data.prose import Passages, docstrings, is_prose, prose

SOURCE = b'''
"""Module text."""
import nothing_that_exists

class A:
    """Class text."""
    x = """not a docstring"""

    async def f(self):
        """Method text."""
        def inner():
            """Inner text."""

if True:
    def g():
        """Guarded text, with a bad escape \\d."""
else:
    try:
        pass
    except E:
        def h():
            """Handler text."""
'''


def test_docstrings_come_in_order_and_nothing_is_run() -> None:
    assert docstrings(SOURCE) == [
        "Module text.",
        "Class text.",
        "Method text.",
        "Inner text.",
        "Guarded text, with a bad escape \\d.",
        "Handler text.",
    ]
    assert gc.isenabled()


@pytest.mark.parametrize("source", [b'def f(:\n """x"""', b'"""a\0b"""', b"# coding: nonsense\n'''x'''", b"x = 1"])
def test_broken_source_has_no_docstrings(source: bytes) -> None:
    assert docstrings(source) == []
    assert gc.isenabled()


NUMPYDOC = """Return the sorted copy of an array along the axis that is given.

    The sort is stable, which means that equal elements
    keep the order in which they were before.

    Parameters
    ----------
    axis : int, optional
        The axis along which the values are to be sorted. If this
        is None, the array is flattened.
    kind : {'quicksort', 'stable'}
        Unused.

    See Also
    --------
    argsort, lexsort

    Examples
    --------
    >>> sort([2, 1])  # this is the comment of an example that is dropped
    array([1, 2]) and the output of it is dropped as well as the rest

    An example of this kind is a thing that we would rather not show::

        for the_item in the_list: this is code and it is not in the text

    .. note::
        This function is slow when the array is not in memory.

    .. versionadded:: 1.2
        and what is below it is dropped, as it is of no use to the reader
    """


def test_numpydoc_becomes_prose() -> None:
    assert prose(NUMPYDOC, Passages()) == "\n\n".join(
        [
            "Return the sorted copy of an array along the axis that is given.",
            "The sort is stable, which means that equal elements keep the order in which they were before.",
            "axis: The axis along which the values are to be sorted. If this is None, the array is flattened.",
            "An example of this kind is a thing that we would rather not show:",
            "This function is slow when the array is not in memory.",
        ]
    )


def test_google_and_sphinx_styles_become_prose() -> None:
    google = """Args:
        size (`int`, *optional*, defaults to 2): The size of the window that is moved over the text.
            It must not be zero.
        mask (`torch.Tensor` of shape `(a, b)`):
            Which of the positions are to be seen by the model.
    Returns:
        The one value that is left when all the others are gone.
    """
    assert prose(google, Passages()).split("\n") == [
        "size: The size of the window that is moved over the text. It must not be zero.",
        "mask: Which of the positions are to be seen by the model.",
        "",
        "The one value that is left when all the others are gone.",
    ]
    sphinx = """
    :param int port: the port of the server that is to be called
    :return: whether the server has answered in the time that it had
    :raises OSError: if the server is not there or does not answer at all
    """
    assert prose(sphinx, Passages()).split("\n") == [
        "port: the port of the server that is to be called",
        "Returns: whether the server has answered in the time that it had",
        "Raises OSError: if the server is not there or does not answer at all",
    ]


def test_markup_is_taken_off() -> None:
    text = (
        "See :class:`~torch.nn.Linear` and ``x`` in [`Model`](link), or `the site <https://x.y>`_ of "
        "[this one](https://a.b) and <b>that</b>."
    )
    assert prose(text, Passages()) == ("See `torch.nn.Linear` and `x` in `Model`, or the site of this one and that.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("This is a sentence that has all the words it needs.", True),
        ("Too short to be one.", False),
        ("batch size learning rate weight decay momentum epsilon beta gamma", False),
        ("for i in x: a[i] = b[i] + c[i] * (d[i] - e[i]) / 2.0 ** f[i]", False),
        ("+-----+-----+ | the | and | +-----+ | of the | a | in | +------+------+", False),
    ],
)
def test_prose_is_told_from_lists_code_and_tables(text: str, expected: bool) -> None:
    assert is_prose(text) is expected


def test_a_passage_is_kept_once_whatever_its_names_and_numbers() -> None:
    passages = Passages()
    first = "Construct a Bert tokenizer for the model, of which there are 12 in `bert_base`."
    second = "Construct a GPT2 tokenizer for the model, of which there are 24 in `gpt2_xl`."
    assert prose(first, passages) == first
    assert prose(second, passages) == ""
    assert passages.dropped == 1
    assert prose("Construct the other tokenizer for the model, of which there are some.", passages) != ""
