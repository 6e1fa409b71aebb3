"""What libvirt says of a VM, as somebody else may read it."""

import pytest
from lxml import etree

from kvmagent.hypervisor.shown import shown_definition, shown_log

NAMESPACES = "xmlns:qemu='urn:qemu' xmlns:my-ns='urn:mine'"


@pytest.mark.parametrize(
    "xml",
    [
        "<graphics type='vnc' passwd='s3cret'/>",
        """<graphics type='vnc' passwd="it's3cret"/>""",
        '<x password = "s3cret"/>',
        "<x apiKey='s3cret' passphrase='s3cret' psk='s3cret' pwd='s3cret' pass='s3cret' auth='s3cret'/>",
        "<qemu:commandline><qemu:arg value='secret,id=a,data=s3cret'/></qemu:commandline>",
        "<my-ns:commandline><my-ns:arg value='s3cret'/></my-ns:commandline>",
        "<qemu:env name='TOKEN' value='s3cret'/>",
        "<qemu:property name='p' type='string' value='s3cret'/>",
        "<lxc:env xmlns:lxc='urn:lxc' name='x' value='s3cret'>s3cret</lxc:env>",
        "<memory my-ns:x='s3cret'>1</memory>",
        "<oemStrings><entry>io.systemd.credential:x=s3cret</entry></oemStrings>",
        "<entry><![CDATA[s3cret]]></entry>",
        "<cmdline>root=/dev/vda luks=s3cret</cmdline>",
        "<bootloader_args>--password s3cret</bootloader_args>",
        "<init>/bin/x --password=s3cret</init>",
        "<kernel>https://user:s3cret@host/vmlinuz</kernel>",
        "<initrd>https://host/initrd?sig=s3cret</initrd>",
        "<title>root's password: s3cret</title>",
        "<description>root's password: s3cret</description>",
        "<metadata><os:user xmlns:os='urn:os'>s3cret</os:user></metadata>",
        "<metadata><a><![CDATA[</metadata>s3cret]]></a>s3cret</metadata>",
        "<metadata><p:policy xmlns:p='urn:kvmagent:policy:1'>s3cret<a>s3cret</a>s3cret</p:policy></metadata>",
        "<source protocol='rbd' name='pool/disk:id=admin:key=s3cret'/>",
        "<source protocol='https' name='disk?sig=s3cret'/>",
        "<source protocol='https' name='disk' query='sig=s3cret'/>",
        "<source file='https://user:s3cret@host/disk'/>",
        "<source dev='nbd://user:s3cret@host/disk'/>",
        "<source file='json:{&quot;driver&quot;:&quot;ssh&quot;,&quot;password&quot;:&quot;s3cret&quot;}'/>",
        "<cookies><cookie name='session'>s3cret</cookie></cookies>",
        "<launchSecurity type='sev'><session>s3cret</session><dhCert>s3cret</dhCert></launchSecurity>",
        "<initenv name='X'>s3cret</initenv>",
        "<anything>s3cret</anything>",
        "<vcpus>s3cret<vcpu/>s3cret</vcpus>",
        "<!-- s3cret --><?x s3cret?>",
    ],
)
def test_a_definition_is_shown_without_secrets(xml: str) -> None:
    shown = shown_definition(f"<domain {NAMESPACES}><name>db-7</name>{xml}<vcpu>2</vcpu></domain>")
    assert "s3cret" not in shown
    assert "<name>db-7</name>" in shown
    assert "<vcpu>2</vcpu>" in shown


def test_what_is_no_definition_is_not_shown() -> None:
    with pytest.raises(ValueError, match="no XML"):
        shown_definition("<domain><graphics passwd='s3cret'/>")


@pytest.mark.parametrize(
    "part",
    [
        "<memory unit='KiB'>262144</memory>",
        "<devices><disk><source file='/var/lib/x.qcow2'/></disk></devices>",
        "<devices><disk><auth username='a'><secret type='ceph' uuid='6a2cd1fe'/></auth></disk></devices>",
        "<memory model='dimm'><target><size unit='KiB'>1</size></target><alias name='ua-x'/></memory>",
        "<devices><channel><target name='org.qemu.guest_agent.0' type='virtio'/></channel></devices>",
        "<os><loader readonly='yes'>/usr/share/OVMF/OVMF_CODE.fd</loader></os>",
    ],
)
def test_a_definition_is_shown_with_what_the_agent_goes_by(part: str) -> None:
    shown = shown_definition(f"<domain>{part}</domain>")
    assert etree.canonicalize(part) in etree.canonicalize(shown)


def test_a_definition_is_shown_with_the_limits_that_its_owner_has_for_the_agent() -> None:
    policy = '<kvmagent:policy xmlns:kvmagent="urn:kvmagent:policy:1" maxCpuNum="8"/>'
    shown = shown_definition(f"<domain><metadata><a>x</a>{policy}<b/></metadata></domain>")
    assert policy in shown
    assert "<a>" not in shown


@pytest.mark.parametrize(
    "line",
    [
        "qemu-system-x86_64: -object secret,id=x,data=s3cret,foo=1: Invalid parameter 'foo'",
        "qemu-system-x86_64: -spice port=5900,password=s3cret,foo=1: Invalid parameter 'foo'",
        "qemu-system-x86_64: -drive file=https://u:s3cret@h/x: Unknown protocol 'https'",
        "qemu-system-x86_64: -drive file=rbd:p/i:id=a:key=s3cret:x: Unknown protocol 'rbd'",
        "qemu-system-x86_64: -fw_cfg name=opt/x,string=s3cret,foo=1: Invalid parameter 'foo'",
        """-drive file=json:{"password-secret":"x","url":"https://u:s3cret@h/","password":"s3cret y"}: warning""",
        "<graphics type='vnc' passwd='s3cret x'/>",
    ],
)
def test_libvirt_s_log_is_shown_without_secrets(line: str) -> None:
    shown = shown_log(f"Nov 28 libvirtd[7]: internal error: {line} end\n")
    assert "s3cret" not in shown
    assert shown.startswith("Nov 28 libvirtd[7]: internal error: ")
    assert shown.endswith(" end\n")
