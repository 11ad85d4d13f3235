"""Everything that touches megatron-core. Importing this package makes megatron-core usable on this rank's device, so
other packages reach megatron-core through it and never import `megatron.core` first."""

from nemo_eppo.megatron import device

device.install()
