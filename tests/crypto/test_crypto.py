"""Ciphers and the kernel's keys."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pyqsd.crypto.cipher import aes_cbc_decrypt

# NIST SP 800-38A, appendix F.2.6: CBC-AES256, decryption.
KEY = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
IV = bytes.fromhex("000102030405060708090a0b0c0d0e0f")
CIPHERTEXT = bytes.fromhex(
    "f58c4c04d6e5f1ba779eabfb5f7bfbd69cfc4e967edb808d679f777bc6702c7d"
    "39f23369a9d9bacfa530e26304231461b2eb05e2c39be9fcda6c19078c6a9d1b"
)
PLAINTEXT = bytes.fromhex(
    "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
    "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
)


def test_aes_cbc() -> None:
    assert aes_cbc_decrypt(KEY, IV, CIPHERTEXT) == PLAINTEXT
    assert aes_cbc_decrypt(KEY, IV, b"") == b""
    for wrong in ((KEY[:-1], IV, CIPHERTEXT), (KEY, IV[:-1], CIPHERTEXT), (KEY, IV, CIPHERTEXT[:-1])):
        with pytest.raises(ValueError):
            aes_cbc_decrypt(*wrong)


def test_the_library_is_loaded_when_it_is_needed() -> None:
    program = """
import asyncio, sys
from pyqsd.chardev.chardev import Chardevs
from pyqsd.qapi.convert import convert
from pyqsd.qom import commands
from pyqsd.qom.objects import Objects
from pyqsd.qom.options import ObjectOptions
options = convert({"qom-type": "secret", "id": "a", "data": "x"}, ObjectOptions)
asyncio.run(Objects(Chardevs()).add(options))
print("cryptography" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"
