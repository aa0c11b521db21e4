"""NNCF: int8 with bias correction; weights alone with GPTQ, AWQ and scale estimation, through OpenVINO."""
