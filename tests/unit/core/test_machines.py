"""Which nodes count as one machine."""

from ckptd.core.machines import machine_key


def test_one_boot_id_is_one_machine_unless_the_zones_differ() -> None:
    assert machine_key("a", "boot", "") == machine_key("b", "boot", "")
    assert machine_key("a", "boot", "left") == machine_key("b", "boot", "left")
    assert machine_key("a", "boot", "left") != machine_key("b", "boot", "right")
    assert machine_key("a", "boot", "") != machine_key("b", "other", "")


def test_a_node_without_a_boot_id_is_a_machine_of_its_own() -> None:
    assert machine_key("a", "", "") != machine_key("b", "", "")
    assert machine_key("a", "", "") != machine_key("b", "a", "")
    assert machine_key("a", "", "left") == machine_key("a", "", "right")
