"""The resident Python of functions: started before its guest is frozen, it waits for code.

Copied into images as a directory, where the agent runs `python3 -IB DIRECTORY SOCKET` as nobody.
It speaks Lambda's Runtime API with the agent over that inherited socket, which is HTTP as on TCP;
`init/order` is ours, and gives it what Lambda's runtimes have in their environment.
"""
