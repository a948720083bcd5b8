"""OpenVINO on the CPU: encoders in float32 and bfloat16."""
