"""The three ways to OpenVINO IR: native, through optimum-intel, and from ONNX files."""
