"""The first half of PPO: prompts in, responses out."""
