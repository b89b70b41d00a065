"""The list of attacks. A new attack is one file, one line here and its name in config/attack.py."""

from __future__ import annotations

from sd_unlearn.attacks.base import Attack
from sd_unlearn.attacks.benign import BENIGN
from sd_unlearn.attacks.completion import COMPLETION
from sd_unlearn.attacks.finetune import FINETUNE
from sd_unlearn.attacks.hard import HARD
from sd_unlearn.attacks.inversion import INVERSION
from sd_unlearn.attacks.noise import NOISE
from sd_unlearn.attacks.prefix import PREFIX
from sd_unlearn.attacks.quantisation import QUANTISATION
from sd_unlearn.attacks.ring import RING
from sd_unlearn.attacks.soft import SOFT
from sd_unlearn.attacks.strength import STRENGTH
from sd_unlearn.attacks.token import TOKEN

ATTACKS: dict[str, Attack] = {
    attack.name: attack
    for attack in (
        *(PREFIX, HARD, TOKEN, SOFT, RING, NOISE),
        *(INVERSION, COMPLETION, FINETUNE, BENIGN, STRENGTH, QUANTISATION),
    )
}
