// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

interface Vm {
    function addr(uint256 key) external pure returns (address);
    function sign(uint256 key, bytes32 digest) external pure returns (uint8 v, bytes32 r, bytes32 s);
    function prank(address sender) external;
    function warp(uint256 time) external;
    function roll(uint256 number) external;
    function prevrandao(bytes32 value) external;
    function setBlockhash(uint256 number, bytes32 hash) external;
    function deal(address account, uint256 amount) external;
    function expectRevert(bytes calldata data) external;
    function assume(bool condition) external pure;
}

/// @dev The few lines of a test library that these tests need.
abstract contract Lite {
    Vm internal constant vm = Vm(address(uint160(uint256(keccak256("hevm cheat code")))));
    address[] private _targets;

    function targetContracts() public view returns (address[] memory) {
        return _targets;
    }

    function target(address account) internal {
        _targets.push(account);
    }

    function same(uint256 a, uint256 b, string memory what) internal pure {
        require(a == b, what);
    }

    function within(uint256 x, uint256 low, uint256 high) internal pure returns (uint256) {
        return x >= low && x <= high ? x : low + x % (high - low + 1);
    }

    function signed(uint256 key, bytes32 digest) internal pure returns (bytes memory) {
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(key, digest);
        return abi.encodePacked(r, s, v);
    }
}
