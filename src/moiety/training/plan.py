def print_plan(config): print(config)
