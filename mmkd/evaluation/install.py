"""The lmms-eval that mmkd is written for, and how it comes."""

LMMS_EVAL = "0.7.3"
# Its dependency list replaces a CPU torch and installs a torchvision that does not work with it.
INSTALL = f"pip install 'mmkd[eval]' && pip install --no-deps lmms-eval=={LMMS_EVAL}"
