// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";
import {IWorkers} from "./interfaces/IWorkers.sol";

contract Workers is IWorkers, EIP712 {
    bytes32 private constant HOT_KEY_TYPE =
        keccak256("HotKey(address owner,address hotKey,address payout,uint256 nonce,uint40 deadline)");

    mapping(address hotKey => Worker) private _workers;

    constructor() EIP712("Gristmill", "1") {}

    /// @inheritdoc IWorkers
    function register(address hotKey, address payout, uint40 deadline, bytes calldata signature) external {
        _activate(hotKey, payout, deadline, signature);
    }

    /// @inheritdoc IWorkers
    function setPayout(address hotKey, address payout) external {
        Worker storage record = _owned(hotKey);
        if (payout == address(0)) revert Workers_ZeroAddress();

        address previous = record.payout;
        record.payout = payout;

        emit PayoutSet(hotKey, previous, payout);
    }

    /// @inheritdoc IWorkers
    function rotate(address hotKey, address newHotKey, uint40 deadline, bytes calldata signature) external {
        Worker storage record = _ownedActive(hotKey);

        record.active = false;
        _activate(newHotKey, record.payout, deadline, signature);

        emit Rotated(hotKey, newHotKey, msg.sender);
    }

    /// @inheritdoc IWorkers
    function revoke(address hotKey) external {
        _ownedActive(hotKey).active = false;

        emit Revoked(hotKey, msg.sender);
    }

    /// @inheritdoc IWorkers
    function payoutOf(address hotKey) external view returns (address) {
        address payout = _workers[hotKey].payout;
        return payout == address(0) ? hotKey : payout;
    }

    /// @inheritdoc IWorkers
    function ownerOf(address hotKey) external view returns (address) {
        return _workers[hotKey].owner;
    }

    /// @inheritdoc IWorkers
    function isActive(address hotKey) external view returns (bool) {
        return _workers[hotKey].active;
    }

    /// @inheritdoc IWorkers
    function worker(address hotKey) external view returns (Worker memory) {
        return _workers[hotKey];
    }

    /// @inheritdoc IWorkers
    function domainSeparator() external view returns (bytes32) {
        return _domainSeparatorV4();
    }

    /// @inheritdoc IWorkers
    function hotKeyDigest(address owner, address hotKey, address payout, uint256 nonce, uint40 deadline)
        public
        view
        returns (bytes32)
    {
        return _hashTypedDataV4(keccak256(abi.encode(HOT_KEY_TYPE, owner, hotKey, payout, nonce, deadline)));
    }

    function _activate(address hotKey, address payout, uint40 deadline, bytes calldata signature) private {
        if (payout == address(0)) revert Workers_ZeroAddress();
        if (block.timestamp >= deadline) revert Workers_Expired(deadline, block.timestamp);
        Worker storage record = _workers[hotKey];
        if (record.active || (record.owner != address(0) && record.owner != msg.sender)) {
            revert Workers_HotKeyTaken(hotKey, record.owner);
        }
        bytes32 digest = hotKeyDigest(msg.sender, hotKey, payout, record.nonce, deadline);
        (address recovered, ECDSA.RecoverError error_,) = ECDSA.tryRecoverCalldata(digest, signature);
        if (error_ != ECDSA.RecoverError.NoError || recovered != hotKey) revert Workers_BadSignature(hotKey);

        record.owner = msg.sender;
        record.active = true;
        record.payout = payout;
        record.nonce += 1;

        emit Registered(hotKey, msg.sender, payout);
    }

    function _owned(address hotKey) private view returns (Worker storage record) {
        record = _workers[hotKey];
        if (record.owner != msg.sender) revert Workers_NotOwner(hotKey, msg.sender);
    }

    function _ownedActive(address hotKey) private view returns (Worker storage record) {
        record = _owned(hotKey);
        if (!record.active) revert Workers_NotActive(hotKey);
    }
}
