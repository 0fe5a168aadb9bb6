"""The text of ``pyqsd --help``."""

TEXT = """\
Usage: {program} [options]
Storage daemon for disk images, compatible with qemu-storage-daemon

  -h, --help             show this text and exit
  -T, --trace [[enable=]<pattern>][,events=<file>][,file=<file>]
                         switch on trace events ("help" lists them)
  -V, --version          show the version and exit

  --blockdev [driver=]<driver>[,node-name=<N>][,discard=ignore|unmap]
             [,cache.direct=on|off][,cache.no-flush=on|off]
             [,read-only=on|off][,auto-read-only=on|off]
             [,force-share=on|off][,detect-zeroes=on|off|unmap]
             [,<options of the driver>...]
                         open an image as a block node

  --chardev [backend=]<backend>,id=<id>[,<options of the backend>...]
                         create a character device ("help" lists the backends)

  --daemonize            go into the background; the command returns when
                         everything on the command line is up

  --export [type=]nbd,id=<id>,node-name=<node-name>[,name=<export-name>]
           [,writable=on|off][,bitmap=<name>]
                         export a block node over NBD (after --nbd-server)

  --export [type=]vhost-user-blk,id=<id>,node-name=<node-name>,
           addr.type=unix,addr.path=<path>[,writable=on|off]
           [,logical-block-size=<bytes>][,num-queues=<n>]
  --export [type=]vhost-user-blk,...,addr.type=fd,addr.str=<fd>[,...]
                         export a block node as a disk of a virtual machine

  --monitor [chardev=]<chardev>[,id=<id>][,mode=control][,pretty=on|off]
                         serve QMP on a character device

  --nbd-server addr.type=inet,addr.host=<host>,addr.port=<port>
               [,max-connections=<n>]
  --nbd-server addr.type=unix,addr.path=<path>[,max-connections=<n>]
  --nbd-server addr.type=fd,addr.str=<fd>[,max-connections=<n>]
                         start the NBD server

  --object help          list the types of objects
  --object <type>,help   list the properties of a type
  --object [qom-type=]<type>,id=<id>[,<property>=<value>...]
                         create an object

  --pidfile <path>       write the process ID to a file when everything is up

Options that take key=value pairs (except --chardev and --trace) also take JSON.
They take effect in the order in which they are given. The daemon runs until
SIGINT, SIGHUP, SIGTERM or the QMP command "quit".
"""
