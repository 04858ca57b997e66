"""Models as OpenVINO graphs, said in opset functions named as the field names them; no torch."""
