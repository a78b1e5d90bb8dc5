"""The agent: secrets for the processes of this machine, over a unix socket."""

# A page in a browser can't send it across origins without being asked first, and nobody is asked.
HEADER = "X-FlowMason-Agent"
READY_PATH = "/agent/v1/ready"
QUIT_PATH = "/agent/v1/quit"
