"""An encoder that taught may not score: one rule, whatever its fingerprint says besides which it is."""

import pytest

from xfusion.data.sequence import XFusionError
from xfusion.evaluation.teachers import is_teacher, refuse_teacher

HASH = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


@pytest.mark.parametrize(
    ("encoder", "teacher", "same"),
    [
        (HASH, HASH, True),
        (HASH, HASH[::-1], False),
        ("org/clip@None#-2", "org/clip@None#-1", True),  # another layer
        ("org/clip@1f3a9c0#-2", "org/clip@None#-2", True),  # another revision
        ("org/clip@1f3a9c0", "org/clip@None#-2", True),
        ("org/clip@None#-2", "org/clip-large@None#-2", False),
        ("org/clip@None", "other/clip@None", False),
        ("red and green#-2", "red and green#-1", True),
        ("FOLDER/clip@None#-2", "clip@None#-2", True),  # the same folder by another path
        ("FOLDER/clip@None#-2", "FOLDER/a/../clip@main#3", True),
        ("FOLDER/one@2/clip@None#-2", "FOLDER/one@3/clip@None#-2", False),
        ("FOLDER/#1@None#-2", "FOLDER/#2@None#-2", False),
    ],
)
def test_layer_revision_and_path_make_no_other_encoder(tmp_path, monkeypatch, encoder, teacher, same):
    monkeypatch.chdir(tmp_path)
    encoder, teacher = (name.replace("FOLDER", str(tmp_path)) for name in (encoder, teacher))
    assert is_teacher(encoder, [teacher]) is is_teacher(teacher, ["another", encoder]) is same
    if same:
        with pytest.raises(XFusionError, match="took part in training what drew: it may not score it, name another"):
            refuse_teacher(encoder, [teacher])
    else:
        refuse_teacher(encoder, [teacher])


def test_nobody_noted_is_nobody():
    assert not is_teacher("org/clip@None", None) and not is_teacher("org/clip@None", ())
